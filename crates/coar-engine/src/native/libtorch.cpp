// Functions of libtorch that coar needs and tch does not bind, as C functions.
//
// Nothing here links to libtorch's CUDA part: streams, events and allocators are accessed through c10's registries,
// which that part fills when it is loaded. So one program serves machines with and without it.
//
// Every function returns 0, or 1 with the reason in `text` (at most `room` bytes, terminated).

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_efficient_attention_forward.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_foreach_zero.h>
#include <ATen/ops/_fused_adamw.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

int fail(char* text, size_t room, const char* reason) {
  std::snprintf(text, room, "%s", reason);
  return 1;
}

template <typename Work>
int guarded(char* text, size_t room, Work&& work) {
  try {
    work();
    return 0;
  } catch (const c10::Error& error) {
    return fail(text, room, error.what_without_backtrace());
  } catch (const std::exception& error) {
    return fail(text, room, error.what());
  } catch (...) {
    return fail(text, room, "an exception of an unknown kind");
  }
}

c10::Device cuda(int index) {
  return c10::Device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(index));
}

c10::Stream current_stream(int index) {
  return c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).getStream(cuda(index));
}

// at::cuda::CUDAGraph is in libtorch's CUDA part and in no registry. Its members are looked up by name, as of the
// version that this program is built with; if one is missing, graphs are not available.
struct GraphCalls {
  using Pool = std::pair<unsigned long long, unsigned long long>;
  void (*construct)(void*, bool) = nullptr;
  void (*destroy)(void*) = nullptr;
  void (*begin)(void*, Pool, int) = nullptr;
  void (*end)(void*) = nullptr;
  void (*replay)(void*) = nullptr;
};

template <typename Call>
void look_up(void* library, Call& call, const char* name) {
  call = reinterpret_cast<Call>(dlsym(library, name));
  if (call == nullptr) {
    throw std::runtime_error(std::string("libtorch_cuda.so lacks ") + name);
  }
}

const GraphCalls& graph_calls() {
  static const GraphCalls calls = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) {
      throw std::runtime_error("libtorch_cuda.so is not loaded");
    }
    GraphCalls found;
    look_up(library, found.construct, "_ZN2at4cuda9CUDAGraphC1Eb");
    look_up(library, found.destroy, "_ZN2at4cuda9CUDAGraphD1Ev");
    look_up(library, found.begin, "_ZN2at4cuda9CUDAGraph13capture_beginESt4pairIyyE21cudaStreamCaptureMode");
    look_up(library, found.end, "_ZN2at4cuda9CUDAGraph11capture_endEv");
    look_up(library, found.replay, "_ZN2at4cuda9CUDAGraph6replayEv");
    return found;
  }();
  return calls;
}

std::vector<at::Tensor> list(const at::Tensor* const* tensors, size_t count) {
  std::vector<at::Tensor> all;
  all.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    all.push_back(*tensors[i]);
  }
  return all;
}

// A CUDAGraph and its device. The object takes about 200 bytes in 2.11.
struct Graph {
  alignas(std::max_align_t) unsigned char object[2048];
  c10::Device device;

  explicit Graph(c10::Device its) : device(its) {
    c10::DeviceGuard guard(device);
    graph_calls().construct(object, /*keep_graph=*/false);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() {
    try {
      c10::DeviceGuard guard(device);
      graph_calls().destroy(object);
    } catch (...) {
      // The device is lost: there is nothing to free.
    }
  }
};

}  // namespace

extern "C" {

// Starts to capture what the calling thread launches on its current stream, which must not be the default one.
int coar_graph_begin(int index, void** graph, char* text, size_t room) {
  return guarded(text, room, [&] {
    // cudaStreamCaptureModeThreadLocal: other threads are not affected.
    constexpr int thread_local_mode = 1;
    auto made = std::make_unique<Graph>(cuda(index));
    c10::DeviceGuard guard(made->device);
    graph_calls().begin(made->object, GraphCalls::Pool(0, 0), thread_local_mode);
    *graph = made.release();
  });
}

// Ends the capture and instantiates the graph.
int coar_graph_end(void* graph, char* text, size_t room) {
  return guarded(text, room, [&] {
    auto* made = static_cast<Graph*>(graph);
    c10::DeviceGuard guard(made->device);
    graph_calls().end(made->object);
  });
}

// Launches the graph on the calling thread's current stream.
int coar_graph_replay(void* graph, char* text, size_t room) {
  return guarded(text, room, [&] {
    auto* made = static_cast<Graph*>(graph);
    c10::DeviceGuard guard(made->device);
    graph_calls().replay(made->object);
  });
}

// Frees a graph that no stream is running.
void coar_graph_free(void* graph) {
  delete static_cast<Graph*>(graph);
}

// Makes a new stream the calling thread's current one.
int coar_stream_use_new(int index, char* text, size_t room) {
  return guarded(text, room, [&] {
    c10::impl::VirtualGuardImpl guard(c10::DeviceType::CUDA);
    guard.exchangeStream(guard.getNewStream(cuda(index)));
  });
}

// Whether the calling thread's current stream differs from the device's default one.
int coar_stream_is_own(int index, int* own, char* text, size_t room) {
  return guarded(text, room, [&] {
    c10::impl::VirtualGuardImpl guard(c10::DeviceType::CUDA);
    *own = guard.getStream(cuda(index)) != guard.getDefaultStream(cuda(index)) ? 1 : 0;
  });
}

// Waits until the calling thread's current stream has completed its work.
int coar_stream_synchronize(int index, char* text, size_t room) {
  return guarded(text, room, [&] {
    c10::impl::VirtualGuardImpl guard(c10::DeviceType::CUDA);
    guard.synchronizeStream(current_stream(index));
  });
}

// Records a new event with a time on the calling thread's current stream.
int coar_event_record(int index, void** event, char* text, size_t room) {
  return guarded(text, room, [&] {
    auto made = std::make_unique<c10::Event>(c10::DeviceType::CUDA, c10::EventFlag::BACKEND_DEFAULT);
    made->record(current_stream(index));
    *event = made.release();
  });
}

// Seconds from one event to a later one; waits for the later one.
int coar_event_seconds(void* from, void* to, double* seconds, char* text, size_t room) {
  return guarded(text, room, [&] {
    auto* later = static_cast<c10::Event*>(to);
    later->synchronize();
    *seconds = static_cast<c10::Event*>(from)->elapsedTime(*later) / 1e3;
  });
}

// Waits until an event has been reached.
int coar_event_wait(void* event, char* text, size_t room) {
  return guarded(text, room, [&] { static_cast<c10::Event*>(event)->synchronize(); });
}

void coar_event_free(void* event) {
  delete static_cast<c10::Event*>(event);
}

// Bytes of libtorch's allocator: allocated, its peak, reserved, its peak.
int coar_allocator_memory(int index, int64_t* bytes, char* text, size_t room) {
  return guarded(text, room, [&] {
    auto* allocator = c10::getDeviceAllocator(c10::DeviceType::CUDA);
    const auto stats = allocator->getDeviceStats(static_cast<c10::DeviceIndex>(index));
    bytes[0] = stats.allocated_bytes[0].current;
    bytes[1] = stats.allocated_bytes[0].peak;
    bytes[2] = stats.reserved_bytes[0].current;
    bytes[3] = stats.reserved_bytes[0].peak;
  });
}

int coar_allocator_reset_peak(int index, char* text, size_t room) {
  return guarded(text, room, [&] {
    c10::getDeviceAllocator(c10::DeviceType::CUDA)->resetPeakStats(static_cast<c10::DeviceIndex>(index));
  });
}

// Returns memory that libtorch caches and does not use to the driver.
int coar_allocator_empty(char* text, size_t room) {
  return guarded(text, room, [&] { c10::getDeviceAllocator(c10::DeviceType::CUDA)->emptyCache(); });
}

// Allows or forbids products and convolutions in f32 to round their inputs to TF32 on CUDA.
int coar_set_tf32(int allowed, char* text, size_t room) {
  return guarded(text, room, [&] {
    const auto precision = allowed != 0 ? at::Float32Precision::TF32 : at::Float32Precision::IEEE;
    for (const auto op : {at::Float32Op::CONV, at::Float32Op::RNN, at::Float32Op::MATMUL}) {
      at::globalContext().setFloat32Precision(at::Float32Backend::CUDA, op, precision);
    }
  });
}

// A one-dimensional tensor of 64-bit integers on a CUDA device, copied asynchronously from pinned memory. The pinned
// block returns to libtorch's host allocator, which does not reuse it before the copy is done.
int coar_upload(const int64_t* numbers, size_t count, int index, at::Tensor** out, char* text, size_t room) {
  return guarded(text, room, [&] {
    const auto options = at::TensorOptions().dtype(at::kLong).pinned_memory(true);
    auto host = at::empty({static_cast<int64_t>(count)}, options);
    if (count > 0) {
      std::memcpy(host.mutable_data_ptr<int64_t>(), numbers, count * sizeof(int64_t));
    }
    *out = new at::Tensor(host.to(cuda(index), /*non_blocking=*/true));
  });
}

// Attention of rows with different numbers of keys. `query` is [1, tokens, 1, head_dim], `key` and `value` are [1,
// all, 1, head_dim]; sequence i has the queries from query_starts[i] to query_starts[i + 1] and the key_lengths[i]
// keys from key_starts[i] on; its last query sees all of them, the one before one less. The three are 32-bit
// integers.
int coar_attend_lengths(const at::Tensor* query, const at::Tensor* key, const at::Tensor* value,
                        const at::Tensor* query_starts, const at::Tensor* key_starts, const at::Tensor* key_lengths,
                        int64_t most_queries, int64_t most_keys, double scale, at::Tensor** out, char* text,
                        size_t room) {
  return guarded(text, room, [&] {
    constexpr int64_t causal_from_bottom_right = 2;
    auto result = at::_efficient_attention_forward(
        *query, *key, *value, /*bias=*/std::nullopt, *query_starts, *key_starts, most_queries, most_keys,
        /*dropout_p=*/0.0, causal_from_bottom_right, /*compute_log_sumexp=*/false, scale, *key_lengths);
    *out = new at::Tensor(std::move(std::get<0>(result)));
  });
}

// One step of AdamW for many parameters at once; `step` is a scalar in f32 on their device, the number of this step.
int coar_adamw(const at::Tensor* const* parameters, const at::Tensor* const* gradients, const at::Tensor* const* first,
               const at::Tensor* const* second, size_t count, const at::Tensor* step, double rate, double beta1,
               double beta2, double weight_decay, double eps, char* text, size_t room) {
  return guarded(text, room, [&] {
    at::NoGradGuard no_grad;
    auto own = list(parameters, count);
    auto gradient = list(gradients, count);
    auto means = list(first, count);
    auto squares = list(second, count);
    const std::vector<at::Tensor> steps(count, *step);
    at::_fused_adamw_(own, gradient, means, squares, {}, steps, rate, beta1, beta2, weight_decay, eps,
                      /*amsgrad=*/false, /*maximize=*/false);
  });
}

// Scales gradients down if their joint norm exceeds `limit`, without synchronising with the device.
int coar_clip(const at::Tensor* const* gradients, size_t count, double limit, char* text, size_t room) {
  return guarded(text, room, [&] {
    at::NoGradGuard no_grad;
    auto all = list(gradients, count);
    const auto norm = at::stack(at::_foreach_norm(all)).norm();
    at::_foreach_mul_(all, norm.clamp_min(limit).reciprocal().mul(limit));
  });
}

// Sets tensors to zero.
int coar_zero(const at::Tensor* const* tensors, size_t count, char* text, size_t room) {
  return guarded(text, room, [&] {
    at::NoGradGuard no_grad;
    auto all = list(tensors, count);
    at::_foreach_zero_(all);
  });
}

}  // extern "C"
