// The clamped GLU of gpt-oss, (up + 1) * gate * sigmoid(alpha * gate), for rows [2 * ffn] of gate
// followed by up. The gate is clamped from above, and up on both sides. A NaN stays one.

KERNEL void clamped_glu(
    const Number* hidden, Number* out, Long rows, Long ffn, float alpha, float limit) {
    for (Long row = first_row(); row < rows; row += grid_row_stride()) {
        const Number* hidden_row = hidden + row * 2 * ffn;
        for (Long i = threadIdx.x * VECTOR; i < ffn; i += blockDim.x * VECTOR) {
            Numbers gate = load(hidden_row + i), up = load(hidden_row + ffn + i);
            Floats result;
            for (int e = 0; e < VECTOR; ++e) {
                float x = wide(gate.x[e]), other = wide(up.x[e]);
                x = x > limit ? limit : x;
                other = other > limit ? limit : other < -limit ? -limit : other;
                result.x[e] = x / (1.0f + expf(-alpha * x)) * (other + 1.0f);
            }
            store_rounded(out + row * ffn + i, result);
        }
    }
}

// `out` receives the gradient of `hidden`; `result` receives the forward output again.
KERNEL void clamped_glu_backward(
    const Number* grad, const Number* hidden, Number* out, Number* result, Long rows, Long ffn,
    float alpha, float limit) {
    for (Long row = first_row(); row < rows; row += grid_row_stride()) {
        const Number* hidden_row = hidden + row * 2 * ffn;
        Number* output_row = out + row * 2 * ffn;
        for (Long i = threadIdx.x * VECTOR; i < ffn; i += blockDim.x * VECTOR) {
            Numbers gate = load(hidden_row + i), up = load(hidden_row + ffn + i);
            Numbers grads = load(grad + row * ffn + i);
            Floats again, gate_slopes, up_slopes;
            for (int e = 0; e < VECTOR; ++e) {
                float x = wide(gate.x[e]), other = wide(up.x[e]), gradient = wide(grads.x[e]);
                float up_gradient = other > limit || other < -limit ? 0.0f : gradient;
                other = other > limit ? limit : other < -limit ? -limit : other;
                float gate_gradient = x > limit ? 0.0f : gradient * (other + 1.0f);
                x = x > limit ? limit : x;
                float denominator = 1.0f + expf(-alpha * x);
                // The same bits as in the forward pass.
                float glu = x / denominator, sigmoid = 1.0f / denominator;
                again.x[e] = glu * (other + 1.0f);
                up_slopes.x[e] = up_gradient * glu;
                float slope = sigmoid * (1.0f + alpha * x * (1.0f - sigmoid));
                gate_slopes.x[e] = gate_gradient * slope;
            }
            store_rounded(output_row + i, gate_slopes);
            store_rounded(output_row + ffn + i, up_slopes);
            store_rounded(result + row * ffn + i, again);
        }
    }
}
