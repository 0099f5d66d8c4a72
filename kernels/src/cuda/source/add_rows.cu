// Sums of rows by their target, without atomic additions: equal inputs give equal bits.

// Elements of a pack: the fp32 sums determine it.
constexpr int SUMMED = VECTOR == 1 ? 1 : 4;

// Adds row `order[i]` of `rows` to row `targets[i]` of `sums`, which has `count` rows. `targets`
// is sorted, and a negative one is skipped. One row of threads adds all rows of a target, in order.
KERNEL void add_rows(
    const Number* rows, const Long* targets, const Long* order, float* sums, Long added, Long count,
    Long width) {
    for (Long first = first_row(); first < added; first += grid_row_stride()) {
        Long target = targets[first];
        if (target < 0 || (first > 0 && targets[first - 1] == target)) {
            continue;
        }
        if (target >= count) {
            __trap();
        }
        Long end = first + 1;
        while (end < added && targets[end] == target) {
            ++end;
        }
        for (Long i = threadIdx.x * SUMMED; i < width; i += blockDim.x * SUMMED) {
            Pack<float, SUMMED> sum = load<SUMMED>(sums + target * width + i);
            for (Long row = first; row < end; ++row) {
                Pack<Number, SUMMED> pack = load<SUMMED>(rows + order[row] * width + i);
                for (int e = 0; e < SUMMED; ++e) {
                    sum.x[e] += wide(pack.x[e]);
                }
            }
            store<SUMMED>(sums + target * width + i, sum);
        }
    }
}
