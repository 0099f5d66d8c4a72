// A token's rows, weighted and added up; `row_ids` [tokens, top_k] says which row of `count` a choice has, and -1 that it has none.

// `weights` [tokens, top_k] may be none.
KERNEL void combine(
    const Number* rows, const Long* row_ids, const float* weights, Number* out, Long count, Long tokens, Long top_k, Long width) {
    for (Long token = first_row(); token < tokens; token += grid_row_stride()) {
        for (Long i = threadIdx.x * VECTOR; i < width; i += blockDim.x * VECTOR) {
            float sums[VECTOR] = {};
            for (Long choice = token * top_k; choice < (token + 1) * top_k; ++choice) {
                Long row_id = row_ids[choice];
                if (row_id < 0) {
                    continue;
                }
                if (row_id >= count) {
                    __trap();
                }
                float weight = weights ? weights[choice] : 1.0f;
                Numbers row = load(rows + row_id * width + i);
                for (int e = 0; e < VECTOR; ++e) {
                    sums[e] += weight * wide(row.x[e]);
                }
            }
            Numbers sum;
            for (int e = 0; e < VECTOR; ++e) {
                sum.x[e] = narrow<Number>(sums[e]);
            }
            store(out + token * width + i, sum);
        }
    }
}

// A warp for each choice: its row's gradient, and its weight's.
KERNEL void combine_backward(
    const Number* grad, const Number* rows, const Long* row_ids, const float* weights, Number* grad_rows, float* grad_weights, Long count,
    Long tokens, Long top_k, Long width) {
    Long choice = first_row();
    if (choice >= tokens * top_k) {
        return;
    }
    Long row_id = row_ids[choice];
    if (row_id >= count) {
        __trap();
    }
    float along = 0;
    if (row_id >= 0) {
        const Number *grad_row = grad + choice / top_k * width, *row = rows + row_id * width;
        for (Long i = threadIdx.x * VECTOR; i < width; i += blockDim.x * VECTOR) {
            Numbers of = load(grad_row + i), pack = load(row + i);
            for (int e = 0; e < VECTOR; ++e) {
                float gradient = wide(of.x[e]);
                along += gradient * wide(pack.x[e]);
                of.x[e] = narrow<Number>(weights[choice] * gradient);
            }
            store(grad_rows + row_id * width + i, of);
        }
    }
    along = row_sum(along, nullptr);
    if (threadIdx.x == 0) {
        grad_weights[choice] = along;
    }
}
