// A token's rows, weighted and added up; `slots` [tokens, choices] says which row of `count` a choice has, and -1 that it has none.

// `weights` [tokens, choices] may be none.
KERNEL void combine(
    const Number* rows, const Long* slots, const float* weights, Number* out, Long count, Long tokens, Long choices, Long width) {
    for (Long token = first_row(); token < tokens; token += all_rows()) {
        for (Long i = threadIdx.x * VECTOR; i < width; i += blockDim.x * VECTOR) {
            float sums[VECTOR] = {};
            for (Long choice = token * choices; choice < (token + 1) * choices; ++choice) {
                Long slot = slots[choice];
                if (slot < 0) {
                    continue;
                }
                if (slot >= count) {
                    __trap();
                }
                float weight = weights ? weights[choice] : 1.0f;
                Numbers row = load(rows + slot * width + i);
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
    const Number* grad, const Number* rows, const Long* slots, const float* weights, Number* of_rows, float* of_weights, Long count,
    Long tokens, Long choices, Long width) {
    Long choice = first_row();
    if (choice >= tokens * choices) {
        return;
    }
    Long slot = slots[choice];
    if (slot >= count) {
        __trap();
    }
    float along = 0;
    if (slot >= 0) {
        const Number *of_token = grad + choice / choices * width, *row = rows + slot * width;
        for (Long i = threadIdx.x * VECTOR; i < width; i += blockDim.x * VECTOR) {
            Numbers of = load(of_token + i), pack = load(row + i);
            for (int e = 0; e < VECTOR; ++e) {
                float gradient = wide(of.x[e]);
                along += gradient * wide(pack.x[e]);
                of.x[e] = narrow<Number>(weights[choice] * gradient);
            }
            store(of_rows + slot * width + i, of);
        }
    }
    along = row_sum(along, nullptr);
    if (threadIdx.x == 0) {
        of_weights[choice] = along;
    }
}
