// SwiGLU (arXiv 2002.05202): silu(gate) * up, for rows [2 * ffn] of gate followed by up.

KERNEL void swiglu(const Number* hidden, Number* out, Long rows, Long ffn) {
    for (Long row = first_row(); row < rows; row += grid_row_stride()) {
        const Number* hidden_row = hidden + row * 2 * ffn;
        for (Long i = threadIdx.x * VECTOR; i < ffn; i += blockDim.x * VECTOR) {
            Numbers gate = load(hidden_row + i), up = load(hidden_row + ffn + i);
            Floats result;
            for (int e = 0; e < VECTOR; ++e) {
                float x = wide(gate.x[e]);
                result.x[e] = x / (1.0f + expf(-x)) * wide(up.x[e]);
            }
            store_rounded(out + row * ffn + i, result);
        }
    }
}

// `out` receives the gradient of `hidden`; `result` receives the forward output again.
KERNEL void swiglu_backward(
    const Number* grad, const Number* hidden, Number* out, Number* result, Long rows, Long ffn) {
    for (Long row = first_row(); row < rows; row += grid_row_stride()) {
        const Number* hidden_row = hidden + row * 2 * ffn;
        Number* output_row = out + row * 2 * ffn;
        for (Long i = threadIdx.x * VECTOR; i < ffn; i += blockDim.x * VECTOR) {
            Numbers gate = load(hidden_row + i), up = load(hidden_row + ffn + i);
            Numbers grads = load(grad + row * ffn + i);
            Floats again, gate_slopes, up_slopes;
            for (int e = 0; e < VECTOR; ++e) {
                float gradient = wide(grads.x[e]), x = wide(gate.x[e]), other = wide(up.x[e]);
                float denominator = 1.0f + expf(-x);
                // The same bits as in the forward pass.
                float silu = x / denominator, sigmoid = 1.0f / denominator;
                again.x[e] = silu * other;
                up_slopes.x[e] = gradient * silu;
                gate_slopes.x[e] = gradient * other * sigmoid * (1.0f + x * (1.0f - sigmoid));
            }
            store_rounded(output_row + i, gate_slopes);
            store_rounded(output_row + ffn + i, up_slopes);
            store_rounded(result + row * ffn + i, again);
        }
    }
}
