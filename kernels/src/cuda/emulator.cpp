// Runs the kernels of source/ on the host, for tests. The threads of a block are fibers that switch
// at barriers and shuffles. Their order is random at each switch and some warps run ahead, so that
// a missing barrier shows. Launches and accesses that a GPU refuses are failures, and so is what
// the undefined-behavior sanitizer finds. Speed can only be measured on a GPU.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <ucontext.h>
#include <utility>
#include <vector>

struct Dim3 {
    unsigned x, y;
};
static Dim3 threadIdx, blockIdx, blockDim, gridDim;

enum class State { runs, at_warp, at_block, done };
struct Thread {
    ucontext_t context;
    State state;
    // True from one barrier of a shuffle to the other.
    bool shuffles;
    unsigned long long shuffled;
    std::vector<char> stack;
};
static std::vector<Thread> threads;
static ucontext_t scheduler;
static size_t current;
static const char* failed;
static float* dynamic_shared;

// Limits of every GPU that the kernels support.
constexpr size_t MAX_THREADS = 1024, MAX_SHARED = 48 << 10;

// What the running block has declared as static shared memory.
struct Declared {
    void* data;
    size_t bytes;
};
static std::vector<Declared> static_shared;
static size_t dynamic_bytes;

static void yield_thread(State state) {
    threads[current].state = state;
    swapcontext(&threads[current].context, &scheduler);
}
static void fail(const char* why) {
    failed = why;
    yield_thread(State::done);
}

// The compiler calls these functions where -fsanitize has found something. Here they replace its
// runtime library, which would end the process. Each gets a description that begins with the place,
// and none returns.
struct SourceLocation {
    const char* file;
    std::uint32_t line, column;
};
[[noreturn]] static void fail_at(const char* what, const SourceLocation* where) {
    static char text[256];
    std::snprintf(text, sizeof text, "%s at %s:%u", what, where->file, where->line);
    for (;;) {
        fail(text);
    }
}
extern "C" {
[[noreturn]] void __ubsan_handle_type_mismatch_v1_abort(
    const SourceLocation* where, std::uintptr_t) {
    fail_at("misaligned address", where);
}
[[noreturn]] void __ubsan_handle_out_of_bounds_abort(const SourceLocation* where, std::uintptr_t) {
    fail_at("index beyond an array", where);
}
#define ARITHMETIC_HANDLER(name, what)                                                             \
    [[noreturn]] void __ubsan_handle_##name##_abort(                                               \
        const SourceLocation* where, std::uintptr_t, std::uintptr_t) {                             \
        fail_at(what, where);                                                                      \
    }
ARITHMETIC_HANDLER(shift_out_of_bounds, "shift beyond the width of a number")
ARITHMETIC_HANDLER(divrem_overflow, "division by zero or overflow")
ARITHMETIC_HANDLER(add_overflow, "overflow of a signed integer")
ARITHMETIC_HANDLER(sub_overflow, "overflow of a signed integer")
ARITHMETIC_HANDLER(mul_overflow, "overflow of a signed integer")
ARITHMETIC_HANDLER(negate_overflow, "overflow of a signed integer")
}

static void __syncthreads() { yield_thread(State::at_block); }
static void __syncwarp() { yield_thread(State::at_warp); }
static void __trap() { fail("trapped"); }

// All 32 threads of a warp take part in each shuffle.
template <class T> static T __shfl_xor_sync(unsigned, T x, int step) {
    if (current / 32 * 32 + 32 > threads.size()) {
        fail("shuffle in a warp of fewer than 32 threads");
    }
    Thread& own = threads[current];
    std::memcpy(&own.shuffled, &x, sizeof(T));
    own.shuffles = true;
    yield_thread(State::at_warp);
    Thread& other = threads[current ^ step];
    if (other.state == State::done) {
        fail("shuffle with a thread that has returned");
    }
    if (!other.shuffles) {
        fail("shuffle with a thread that waits elsewhere");
    }
    T theirs;
    std::memcpy(&theirs, &other.shuffled, sizeof(T));
    yield_thread(State::at_warp);
    threads[current].shuffles = false;
    return theirs;
}

// Counts static shared memory at its declaration, and fills it with NaN: a GPU does not clear it.
static void declare_shared(void* data, size_t bytes) {
    size_t sum = dynamic_bytes + bytes;
    for (const Declared& declared : static_shared) {
        if (declared.data == data) {
            return;
        }
        sum += declared.bytes;
    }
    static_shared.push_back({data, bytes});
    std::memset(data, 0xff, bytes);
    if (sum > MAX_SHARED) {
        fail("more than 48 KB of static and dynamic shared memory");
    }
}
static unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
static float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

#define KERNEL static
#define __device__
#define __forceinline__ inline
#define DYNAMIC_SHARED(type, name) type* name = dynamic_shared
#define STATIC_SHARED(type, name, count)                                                           \
    static type name[count];                                                                       \
    declare_shared(name, sizeof(name))
// The same source that the GPU compiler gets.
#include "program.cu"

template <class... A, size_t... I>
static void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<A*>(arguments[I])...);
}
template <auto kernel> static void unpacked(void** arguments) {
    auto run = [&]<class... A>(void (*function)(A...)) {
        call(function, arguments, std::index_sequence_for<A...>());
    };
    run(kernel);
}
struct Named {
    const char* name;
    void (*run)(void**);
};
#define NAMED(kernel) {#kernel, unpacked<kernel>}
static const Named kernels[] = {
    NAMED(adamw),
    NAMED(add_rows),
    NAMED(select_experts),
    NAMED(combine),
    NAMED(combine_backward),
    NAMED(cross_entropy),
    NAMED(router),
    NAMED(router_backward),
    NAMED(quantize),
    NAMED(rms_norm),
    NAMED(rms_norm_backward),
    NAMED(apply_rotary),
    NAMED(softmax),
    NAMED(softmax_gradient),
    NAMED(swiglu),
    NAMED(swiglu_backward),
    NAMED(clamped_glu),
    NAMED(clamped_glu_backward),
};

static void (*body)(void**);
static void** body_arguments;
static void run_thread() {
    body(body_arguments);
    yield_thread(State::done);
}

// Runs the threads of a block until all of them have returned.
static void run_block(std::mt19937& random) {
    size_t count = threads.size();
    std::vector<size_t> order(count);
    for (size_t i = 0; i < count; ++i) {
        order[i] = i;
    }
    auto waits_or_is_done = [](size_t thread, State state) {
        return threads[thread].state == state || threads[thread].state == State::done;
    };
    // One bit per warp that does not run for a while.
    unsigned held_back_warps = 0;
    for (bool any = true, moved = false; any && !failed;) {
        any = false;
        std::shuffle(order.begin(), order.end(), random);
        if (!moved || random() % 32 == 0) {
            held_back_warps = random();
        }
        moved = false;
        for (size_t thread : order) {
            bool can = threads[thread].state == State::runs && !failed;
            any |= can;
            if (can && !(held_back_warps >> thread / 32 & 1)) {
                moved = true;
                current = thread;
                threadIdx = {unsigned(thread % blockDim.x), unsigned(thread / blockDim.x)};
                swapcontext(&scheduler, &threads[thread].context);
            }
        }
        // Resumes the threads of a barrier that all threads have reached.
        auto release = [&](size_t begin, size_t end, State state) {
            for (size_t thread = begin; thread < end; ++thread) {
                if (!waits_or_is_done(thread, state)) {
                    return;
                }
            }
            for (size_t thread = begin; thread < end; ++thread) {
                if (threads[thread].state == state) {
                    threads[thread].state = State::runs;
                    any = true;
                }
            }
        };
        for (size_t warp = 0; warp < count; warp += 32) {
            release(warp, std::min(warp + 32, count), State::at_warp);
        }
        release(0, count, State::at_block);
    }
    for (const Thread& thread : threads) {
        if (!failed && thread.state != State::done) {
            failed = "deadlock: threads wait for each other";
        }
    }
}

// Runs a kernel and returns an error message, or null. Not reentrant.
extern "C" const char* emulate(
    const char* name, unsigned blocks, unsigned width, unsigned height, unsigned shared,
    unsigned seed, void** arguments) {
    body = nullptr;
    for (const Named& kernel : kernels) {
        if (!std::strcmp(kernel.name, name)) {
            body = kernel.run;
        }
    }
    if (!body) {
        return "no such kernel";
    }
    if (width * height > MAX_THREADS) {
        return "more than 1024 threads in a block";
    }
    if (shared > MAX_SHARED) {
        return "more than 48 KB of static and dynamic shared memory";
    }
    failed = nullptr;
    body_arguments = arguments;
    dynamic_bytes = shared;
    gridDim = {blocks, 1};
    blockDim = {width, height};
    std::mt19937 random(seed);
    for (unsigned block = 0; block < blocks && !failed; ++block) {
        blockIdx = {block, 0};
        // A GPU does not clear shared memory either.
        std::vector<float> memory(shared / 4 + 1, NAN);
        dynamic_shared = memory.data();
        static_shared.clear();
        threads.resize(width * height);
        for (Thread& thread : threads) {
            thread.stack.resize(64 << 10);
            thread.state = State::runs;
            thread.shuffles = false;
            getcontext(&thread.context);
            thread.context.uc_stack.ss_sp = thread.stack.data();
            thread.context.uc_stack.ss_size = thread.stack.size();
            thread.context.uc_link = nullptr;
            makecontext(&thread.context, run_thread, 0);
        }
        run_block(random);
    }
    return failed;
}
