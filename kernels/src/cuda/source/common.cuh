// Types and functions that the kernels share. They are compiled for one dtype at a time: NUMBER is
// float or bf16. All arithmetic is in fp32. VECTOR is the number of elements that a thread reads
// and writes at once: 16 bytes if all rows are aligned to them, else one element.

struct alignas(2) bf16 {
    unsigned short bits;
};

typedef NUMBER Number;
typedef long long Long;

#ifndef KERNEL
#define KERNEL extern "C" __global__
#define DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#define STATIC_SHARED(type, name, count) __shared__ type name[count]
#endif

__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ float wide(bf16 x) { return __uint_as_float(unsigned(x.bits) << 16); }

// Rounds two numbers to nearest, ties to even, and returns the bits of bf16 `high` and `low`.
__device__ __forceinline__ unsigned bf16_pair(float high, float low) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    unsigned halves[2];
    for (int i = 0; i < 2; ++i) {
        unsigned bits = __float_as_uint(i ? high : low);
        bool number = (bits & 0x7fffffff) <= 0x7f800000;
        halves[i] = number ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fff;
    }
    return halves[1] << 16 | halves[0];
#endif
}

// Elements that a thread reads and writes at once.
template <class T, int V> struct alignas(sizeof(T) * V) Pack {
    T x[V];
};
typedef Pack<Number, VECTOR> Numbers;
typedef Pack<float, VECTOR> Floats;

template <int V = VECTOR, class T> __device__ __forceinline__ Pack<T, V> load(const T* x) {
    return *reinterpret_cast<const Pack<T, V>*>(x);
}
template <int V = VECTOR, class T>
__device__ __forceinline__ void store(T* x, const Pack<T, V>& pack) {
    *reinterpret_cast<Pack<T, V>*>(x) = pack;
}

// Rounds to the dtype of `out`.
template <int V>
__device__ __forceinline__ void round_to(Pack<float, V>& out, const Pack<float, V>& x) {
    out = x;
}
template <int V>
__device__ __forceinline__ void round_to(Pack<bf16, V>& out, const Pack<float, V>& x) {
    for (int e = 0; e + 1 < V; e += 2) {
        unsigned pair = bf16_pair(x.x[e + 1], x.x[e]);
        memcpy(&out.x[e], &pair, sizeof pair);
    }
    if (V == 1) {
        out.x[0].bits = bf16_pair(0.0f, x.x[0]);
    }
}
template <class T, int V>
__device__ __forceinline__ void store_rounded(T* to, const Pack<float, V>& x) {
    Pack<T, V> pack;
    round_to(pack, x);
    store<V>(to, pack);
}

// A block has blockDim.y rows of blockDim.x threads each. A thread starts at matrix row
// `first_row` and advances by `grid_row_stride`.
__device__ __forceinline__ Long first_row() { return Long(blockIdx.x) * blockDim.y + threadIdx.y; }
__device__ __forceinline__ Long grid_row_stride() { return Long(gridDim.x) * blockDim.y; }

// Returns the sum of `x` over the blockDim.x threads of a row, with the same bits on each of them.
// A row is one warp, or several warps that are the whole block. `shared` has an element per warp.
// Two sums in sequence need different ones, so that no warp overwrites what another still reads.
__device__ __forceinline__ float row_sum(float x, float* shared) {
    for (int step = 16; step > 0; step /= 2) {
        x += __shfl_xor_sync(~0u, x, step);
    }
    if (blockDim.x == 32) {
        return x;
    }
    if (threadIdx.x % 32 == 0) {
        shared[threadIdx.x / 32] = x;
    }
    __syncthreads();
    float sum = 0;
    for (int warp = 0; warp < blockDim.x / 32; ++warp) {
        sum += shared[warp];
    }
    return sum;
}
