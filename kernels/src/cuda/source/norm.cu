// RMSNorm (arXiv 1910.07467). The gain of a column is `weight + offset`. A block has several rows
// of 32 threads, or one row of more threads. If `rounds_before` is not 0, normed rows are rounded
// before the product with the gain, too.

KERNEL void rms_norm(
    const Number* x, const Number* weight, float offset, Long rounds_before, Number* out,
    float* scale, Long rows, Long width, float eps) {
    STATIC_SHARED(float, shared, 32);
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
        Floats normed;
        for (int e = 0; e < VECTOR; ++e) {
            normed.x[e] = wide(pack.x[e]) * factor;
        }
        if (rounds_before) {
            round_to(pack, normed);
            for (int e = 0; e < VECTOR; ++e) {
                normed.x[e] = wide(pack.x[e]);
            }
        }
        for (int e = 0; e < VECTOR; ++e) {
            normed.x[e] *= wide(weights.x[e]) + offset;
        }
        store_rounded(out + i, normed);
    }
}

// `partial` [blocks, width] receives the gradient of `weight` from the rows of each block. A thread
// sums its columns over all its rows in `sums` [blockDim.y, width]. There the e-th elements of all
// packs are adjacent, so that the additions of a warp use different banks.
KERNEL void rms_norm_backward(
    const Number* grad, const Number* x, const float* scale, const Number* weight, float offset,
    Number* out, float* partial, Long rows, Long width) {
    STATIC_SHARED(float, shared, 32);
    DYNAMIC_SHARED(float, sums);
    // One half of `shared` serves even rows, the other one odd ones.
    int half = 0;
    int thread = threadIdx.y * blockDim.x + threadIdx.x;
    int threads = blockDim.x * blockDim.y;
    int packs = width / VECTOR;
    for (int i = thread; i < blockDim.y * width; i += threads) {
        sums[i] = 0;
    }
    __syncthreads();
    float* own = sums + threadIdx.y * width;
    for (Long row = first_row(); row < rows; row += grid_row_stride()) {
        float factor = scale[row], along = 0;
        for (Long i = threadIdx.x * VECTOR; i < width; i += blockDim.x * VECTOR) {
            Numbers grads = load(grad + row * width + i), pack = load(x + row * width + i);
            Numbers weights = load(weight + i);
            for (int e = 0; e < VECTOR; ++e) {
                along += wide(grads.x[e]) * (wide(weights.x[e]) + offset) * wide(pack.x[e]);
            }
        }
        along = row_sum(along, shared + half) * factor / width;
        half ^= 16;
        for (Long i = threadIdx.x * VECTOR; i < width; i += blockDim.x * VECTOR) {
            Numbers grads = load(grad + row * width + i), pack = load(x + row * width + i);
            Numbers weights = load(weight + i);
            Floats slopes;
            for (int e = 0; e < VECTOR; ++e) {
                float gradient = wide(grads.x[e]), normed = wide(pack.x[e]) * factor;
                own[e * packs + i / VECTOR] += gradient * normed;
                slopes.x[e] = (gradient * (wide(weights.x[e]) + offset) - normed * along) * factor;
            }
            store_rounded(out + row * width + i, slopes);
        }
    }
    __syncthreads();
    for (int i = thread; i < width; i += threads) {
        int column = i % VECTOR * packs + i / VECTOR;
        float sum = 0;
        for (int y = 0; y < blockDim.y; ++y) {
            sum += sums[y * width + column];
        }
        partial[blockIdx.x * width + i] = sum;
    }
}
