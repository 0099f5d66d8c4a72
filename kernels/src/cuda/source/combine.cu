// The weighted sum of each token's expert outputs. `row_ids` [tokens, top_k] holds the row of each
// routed token, below `count`, or -1 if it has none.

// Rows of a token that a thread loads before it adds the first.
constexpr int LOADED_ROWS = 4;

// `weights` [tokens, top_k] may be null.
KERNEL void combine(
    const Number* rows, const int* row_ids, const float* weights, Number* out, Long count,
    Long tokens, Long top_k, Long width) {
    for (Long token = first_row(); token < tokens; token += grid_row_stride()) {
        for (Long i = threadIdx.x * VECTOR; i < width; i += blockDim.x * VECTOR) {
            Floats sums = {};
            Long end = (token + 1) * top_k;
            for (Long first = token * top_k; first < end; first += LOADED_ROWS) {
                Long ids[LOADED_ROWS];
                float factors[LOADED_ROWS];
                Numbers loaded[LOADED_ROWS];
                #pragma unroll
                for (int slot = 0; slot < LOADED_ROWS; ++slot) {
                    bool exists = first + slot < end;
                    ids[slot] = exists ? row_ids[first + slot] : -1;
                    factors[slot] = exists && weights ? weights[first + slot] : 1.0f;
                    if (ids[slot] >= count) {
                        __trap();
                    }
                }
                #pragma unroll
                for (int slot = 0; slot < LOADED_ROWS; ++slot) {
                    if (ids[slot] >= 0) {
                        loaded[slot] = load(rows + ids[slot] * width + i);
                    }
                }
                #pragma unroll
                for (int slot = 0; slot < LOADED_ROWS; ++slot) {
                    if (ids[slot] >= 0) {
                        for (int e = 0; e < VECTOR; ++e) {
                            sums.x[e] += factors[slot] * wide(loaded[slot].x[e]);
                        }
                    }
                }
            }
            store_rounded(out + token * width + i, sums);
        }
    }
}

// Each warp computes the gradients of the row and the weight of one routed token.
KERNEL void combine_backward(
    const Number* grad, const Number* rows, const int* row_ids, const float* weights,
    Number* grad_rows, float* grad_weights, Long count, Long tokens, Long top_k, Long width) {
    Long routed_token = first_row();
    if (routed_token >= tokens * top_k) {
        return;
    }
    Long row_id = row_ids[routed_token];
    if (row_id >= count) {
        __trap();
    }
    float along = 0, weight = weights[routed_token];
    if (row_id >= 0) {
        const Number* grad_row = grad + routed_token / top_k * width;
        const Number* row = rows + row_id * width;
        for (Long i = threadIdx.x * VECTOR; i < width; i += blockDim.x * VECTOR) {
            Numbers grads = load(grad_row + i), pack = load(row + i);
            Floats weighted;
            for (int e = 0; e < VECTOR; ++e) {
                float gradient = wide(grads.x[e]);
                along += gradient * wide(pack.x[e]);
                weighted.x[e] = weight * gradient;
            }
            store_rounded(grad_rows + row_id * width + i, weighted);
        }
    }
    along = row_sum(along, nullptr);
    if (threadIdx.x == 0) {
        grad_weights[routed_token] = along;
    }
}
