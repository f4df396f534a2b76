#include "host/cuda_step.h"

namespace fusedopt::host {
namespace {

// A launch waits where the queue of its stream is full. With a thread for each device, what drains
// the queue may be for another thread to start; with one device it is not worth the time that it
// takes to hold the gradients.
template <class Launch>
std::string launched(const TableSource& source, Launch launch) {
  if (!cuda::uses_several_devices()) return launch();
  source.before_python();
  const WithoutGil unlocked;
  return launch();
}

}  // namespace

const cuda::StepArgs& CudaDriver::prepare(const TableSource& source, const CudaOptions& options) {
  if (table_.refresh(source) || args_ == nullptr) {
    auto args = std::make_unique<cuda::StepArgs>();
    args->rows = reinterpret_cast<Row*>(table_.rows());
    args->chunks = reinterpret_cast<const ChunkRef*>(table_.chunks());
    args->layouts = reinterpret_cast<const Layout*>(table_.layouts());
    args->row_count = table_.row_count();
    args->chunk_count = table_.chunk_count();
    args_ = nullptr;
    source.before_python();
    const Ref workspace =
        Ref::checked(PyObject_CallMethod(source.host, "workspace_address", "K",
                                         static_cast<unsigned long long>(sizeof(cuda::Workspace))));
    args->workspace = static_cast<cuda::Workspace*>(PyLong_AsVoidPtr(workspace.get()));
    if (PyErr_Occurred()) throw PythonError{};
    args_ = std::move(args);
  }
  cuda::StepArgs& a = *args_;
  if (DeviceTable::word_count(source.table) <= cuda::kInlineWords) {
    DeviceTable::write_words(source.table, a.words);
    a.spilled = nullptr;
  } else {
    a.spilled = reinterpret_cast<const uint64_t*>(table_.upload_words(source));
  }
  a.grad_scale = options.grad_scale;
  a.found_inf = options.found_inf;
  a.squared_norm = options.squared_norm;
  a.grad_norm = options.grad_norm;
  a.skipped_steps = options.skipped_steps;
  a.squared_norm_out = options.squared_norm_out;
  a.max_norm = options.max_norm;
  a.clip_value = options.clip_value;
  a.norm = options.norm;
  a.norm_only = options.norm_only;
  a.skip_nonfinite = options.skip_nonfinite;
  return a;
}

bool CudaDriver::step(Plan* plan, const CudaOptions& options) {
  if (plan->rows() == 0) return false;
  const TableSource source = plan->source();
  const cuda::StepArgs& args = prepare(source, options);
  const int device = table_.device();
  std::string error =
      launched(source, [&] { return cuda::launch(plan->rule(), args, device, options.stream); });
  bool skipped = false;
  const bool may_skip = options.found_inf != nullptr || options.skip_nonfinite;
  if (error.empty() && may_skip && !options.norm_only && plan->has_created_state()) {
    // What the stream waits for may be for another thread to start.
    plan->hold_grads();
    const WithoutGil unlocked;
    error = cuda::read_skipped(args.workspace, device, options.stream, &skipped);
  }
  if (!error.empty()) raise(PyExc_RuntimeError, "the CUDA step failed: " + error);
  if (!options.norm_only && !skipped && plan->has_created_state()) table_.end_first_step();
  return skipped;
}

void CudaDriver::clip(const TableSource& source, const CudaOptions& options) {
  const cuda::StepArgs& args = prepare(source, options);
  const std::string error =
      launched(source, [&] { return cuda::launch_clip(args, table_.device(), options.stream); });
  if (!error.empty()) raise(PyExc_RuntimeError, "clipping on CUDA failed: " + error);
}

}  // namespace fusedopt::host
