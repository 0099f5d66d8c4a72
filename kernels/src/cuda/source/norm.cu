// RMSNorm (arXiv 1910.07467). A block is rows of 32 threads, or one row of more.

KERNEL void rms_norm(const Number* x, const Number* weight, Number* out, float* scale, Long rows, Long width, float eps) {
    __shared__ float shared[32];
    Long row = first_row();
    if (row >= rows) {
        return;
    }
    x += row * width;
    out += row * width;
    float squares = 0;
    for (Long i = threadIdx.x * VECTOR; i < width; i += blockDim.x * VECTOR) {
        Numbers pack = load(x + i);
        for (int e = 0; e < VECTOR; ++e) {
            squares += wide(pack.x[e]) * wide(pack.x[e]);
        }
    }
    float factor = 1.0f / sqrtf(row_sum(squares, shared) / width + eps);
    if (threadIdx.x == 0) {
        scale[row] = factor;
    }
    for (Long i = threadIdx.x * VECTOR; i < width; i += blockDim.x * VECTOR) {
        Numbers pack = load(x + i), weights = load(weight + i);
        for (int e = 0; e < VECTOR; ++e) {
            float rounded = wide(narrow<Number>(wide(pack.x[e]) * factor));
            pack.x[e] = narrow<Number>(rounded * wide(weights.x[e]));
        }
        store(out + i, pack);
    }
}

// `partial` [blocks, width]: the gradient of `weight`, as each block's rows make it. A thread adds up its columns over all its rows, in
// `sums` [blockDim.y, width]: the e-th numbers of packs lie beside each other there, so that a warp's additions meet different banks.
KERNEL void rms_norm_backward(
    const Number* grad, const Number* x, const float* scale, const Number* weight, Number* out, float* partial, Long rows, Long width) {
    __shared__ float shared[32];
    DYNAMIC_SHARED(float, sums);
    int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y, packs = width / VECTOR;
    for (int i = thread; i < blockDim.y * width; i += threads) {
        sums[i] = 0;
    }
    __syncthreads();
    float* own = sums + threadIdx.y * width;
    for (Long row = first_row(); row < rows; row += grid_row_stride()) {
        float factor = scale[row], along = 0;
        for (Long i = threadIdx.x * VECTOR; i < width; i += blockDim.x * VECTOR) {
            Numbers of = load(grad + row * width + i), pack = load(x + row * width + i), weights = load(weight + i);
            for (int e = 0; e < VECTOR; ++e) {
                along += wide(of.x[e]) * wide(weights.x[e]) * wide(pack.x[e]);
            }
        }
        along = row_sum(along, shared) * factor / width;
        for (Long i = threadIdx.x * VECTOR; i < width; i += blockDim.x * VECTOR) {
            Numbers of = load(grad + row * width + i), pack = load(x + row * width + i), weights = load(weight + i);
            for (int e = 0; e < VECTOR; ++e) {
                float gradient = wide(of.x[e]), normed = wide(pack.x[e]) * factor;
                own[e * packs + i / VECTOR] += gradient * normed;
                of.x[e] = narrow<Number>((gradient * wide(weights.x[e]) - normed * along) * factor);
            }
            store(out + row * width + i, of);
        }
    }
    __syncthreads();
    for (int i = thread; i < width; i += threads) {
        int place = i % VECTOR * packs + i / VECTOR;
        float sum = 0;
        for (int y = 0; y < blockDim.y; ++y) {
            sum += sums[y * width + place];
        }
        partial[blockIdx.x * width + i] = sum;
    }
}
