#include "host/cuda_step.h"

namespace fusedopt::host {

const cuda::StepArgs& CudaDriver::prepare(const TableSource& source, const CudaOptions& options) {
  if (table_.refresh(source) || args_ == nullptr) {
    auto args = std::make_unique<cuda::StepArgs>();
    args->rows = reinterpret_cast<const Row*>(table_.rows());
    args->chunks = reinterpret_cast<const ChunkRef*>(table_.chunks());
    args->layouts = reinterpret_cast<const Layout*>(table_.layouts());
    args->row_count = table_.row_count();
    args->chunk_count = table_.chunk_count();
    args_ = nullptr;
    const Ref workspace = Ref::checked(PyObject_CallMethod(
        source.host, "workspace", "K", static_cast<unsigned long long>(sizeof(cuda::Workspace))));
    TensorView view;
    if (!TensorAccess::instance().read(workspace.get(), &view))
      raise(PyExc_RuntimeError, "the workspace must be a dense tensor");
    args->workspace = static_cast<cuda::Workspace*>(view.dl.data);
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
  std::string error = cuda::launch(plan->rule(), args, table_.device(), options.stream);
  bool skipped = false;
  const bool may_skip = options.found_inf != nullptr || options.skip_nonfinite;
  if (error.empty() && may_skip && !options.norm_only && plan->has_created_state())
    error = cuda::read_skipped(args.workspace, table_.device(), options.stream, &skipped);
  if (!error.empty()) raise(PyExc_RuntimeError, "the CUDA step failed: " + error);
  return skipped;
}

void CudaDriver::clip(const TableSource& source, const CudaOptions& options) {
  const cuda::StepArgs& args = prepare(source, options);
  const std::string error = cuda::launch_clip(args, table_.device(), options.stream);
  if (!error.empty()) raise(PyExc_RuntimeError, "clipping on CUDA failed: " + error);
}

}  // namespace fusedopt::host
