// What libtorch's C interface (tch) leaves out of CUDA: streams, graphs, copies that nobody waits for.
//
// A shared object of its own, opened at run time by `node/torch/src/shim.rs` after libtorch_cuda.so: its
// undefined names are libtorch's, so it is built from headers alone (`build.sh`), without a GPU and without
// CUDA's libraries. Every function returns 0, or 1 with a message in `text`, and throws nothing. Tensors are
// `at::Tensor *`, as tch has them; the caller keeps them alive.

#include <ATen/Tensor.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>

namespace {

template <typename Work> int guarded(char *text, std::size_t size, Work work) {
  const char *why = "unknown error";
  try {
    work();
    return 0;
  } catch (const c10::Error &error) {
    why = error.what_without_backtrace();
    std::strncpy(text, why, size - 1);
  } catch (const std::exception &error) {
    std::strncpy(text, error.what(), size - 1);
  } catch (...) {
    std::strncpy(text, why, size - 1);
  }
  text[size - 1] = 0;
  return 1;
}

} // namespace

extern "C" {

// Of this file's functions: the program refuses a shim of another number.
int32_t millrace_shim_version() { return 1; }

// A stream of its own for this thread, from libtorch's pool: a graph cannot be captured on the default one,
// and stages of one process do not wait for each other's work.
int millrace_stream_own(int32_t device, char *text, std::size_t size) {
  return guarded(text, size, [&] {
    c10::cuda::set_device(static_cast<c10::DeviceIndex>(device));
    auto stream = c10::cuda::getStreamFromPool(false, static_cast<c10::DeviceIndex>(device));
    c10::cuda::setCurrentCUDAStream(stream);
  });
}

// Waits for all that this thread's stream was asked for.
int millrace_stream_wait(int32_t device, char *text, std::size_t size) {
  return guarded(text, size, [&] {
    c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(device)).synchronize();
  });
}

// Asks for a copy between a device and pinned memory of the host, and goes on.
int millrace_copy(void *to, void *from, char *text, std::size_t size) {
  return guarded(text, size, [&] {
    static_cast<at::Tensor *>(to)->copy_(*static_cast<at::Tensor *>(from), true);
  });
}

// Begins to record what this thread asks of the device: nothing of it is done. `like`: another graph whose
// memory it may use, since the two never run at once; or null.
int millrace_graph_begin(void **graph, void *like, char *text, std::size_t size) {
  *graph = nullptr;
  return guarded(text, size, [&] {
    auto made = std::make_unique<at::cuda::CUDAGraph>();
    auto pool = like == nullptr ? at::cuda::graph_pool_handle()
                                : static_cast<at::cuda::CUDAGraph *>(like)->pool();
    // Other threads of this process may allocate meanwhile.
    made->capture_begin(pool, cudaStreamCaptureModeThreadLocal);
    *graph = made.release();
  });
}

// Ends the recording; after a failure the graph is of no use but to be freed.
int millrace_graph_end(void *graph, char *text, std::size_t size) {
  return guarded(text, size, [&] { static_cast<at::cuda::CUDAGraph *>(graph)->capture_end(); });
}

// Asks for all of it, on this thread's stream.
int millrace_graph_replay(void *graph, char *text, std::size_t size) {
  return guarded(text, size, [&] { static_cast<at::cuda::CUDAGraph *>(graph)->replay(); });
}

int millrace_graph_free(void *graph, char *text, std::size_t size) {
  return guarded(text, size, [&] { delete static_cast<at::cuda::CUDAGraph *>(graph); });
}

} // extern "C"
