#include "host/cuda_step.h"

#include <cstring>

namespace fusedopt::host {
namespace {

// The parts of the table, one after the other, each aligned for any of its members.
class Image {
 public:
  template <class T>
  size_t add(const std::vector<T>& part) {
    bytes_.resize((bytes_.size() + 15) / 16 * 16);
    const size_t at = bytes_.size();
    bytes_.resize(at + part.size() * sizeof(T));
    if (!part.empty()) std::memcpy(bytes_.data() + at, part.data(), part.size() * sizeof(T));
    return at;
  }
  const std::vector<char>& bytes() const { return bytes_; }

 private:
  std::vector<char> bytes_;
};

template <class T>
bool same_bytes(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || !std::memcmp(a.data(), b.data(), a.size() * sizeof(T)));
}

}  // namespace

uintptr_t CudaDriver::upload(const CudaTable& table, const void* from, size_t bytes,
                             const char* slot) {
  table.before_python();
  ++uploads_;
  const auto address = static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(from));
  const Ref there =
      Ref::checked(PyObject_CallMethod(table.host, "upload", "KKsi", address,
                                       static_cast<unsigned long long>(bytes), slot, table.device));
  void* const result = PyLong_AsVoidPtr(there.get());
  if (PyErr_Occurred()) throw PythonError{};
  return reinterpret_cast<uintptr_t>(result);
}

void CudaDriver::refresh_table(const CudaTable& table) {
  std::vector<Row> rows = table.table.rows;
  for (Row& row : rows) row.data[kGrad] = nullptr;
  if (args_ != nullptr && device_ == table.device && same_bytes(rows, rows_) &&
      same_bytes(table.table.layouts, layouts_))
    return;
  auto args = std::make_unique<cuda::StepArgs>();
  std::vector<cuda::ChunkRef> chunks;
  for (size_t r = 0; r < rows.size(); ++r)
    for (int64_t begin = 0; begin < rows[r].numel; begin += cuda::kChunk)
      chunks.push_back({static_cast<int32_t>(r), static_cast<int32_t>(begin / cuda::kChunk)});
  Image image;
  const size_t rows_at = image.add(rows), chunks_at = image.add(chunks),
               layouts_at = image.add(table.table.layouts);
  const uintptr_t base = upload(table, image.bytes().data(), image.bytes().size(), "table");
  args->rows = reinterpret_cast<const Row*>(base + rows_at);
  args->chunks = reinterpret_cast<const cuda::ChunkRef*>(base + chunks_at);
  args->layouts = reinterpret_cast<const Layout*>(base + layouts_at);
  args->row_count = static_cast<int32_t>(rows.size());
  args->chunk_count = static_cast<int32_t>(chunks.size());
  const Ref workspace = Ref::checked(
      PyObject_CallMethod(table.host, "workspace", "Ki",
                          static_cast<unsigned long long>(sizeof(cuda::Workspace)), table.device));
  args->workspace = static_cast<cuda::Workspace*>(PyLong_AsVoidPtr(workspace.get()));
  if (PyErr_Occurred()) throw PythonError{};
  rows_ = std::move(rows);
  layouts_ = table.table.layouts;
  device_ = table.device;
  spilled_.clear();
  args_ = std::move(args);
}

void CudaDriver::refresh_words(const CudaTable& table) {
  const size_t grads = table.table.rows.size();
  const size_t groups = table.table.groups.size() * cuda::kGroupWords;
  const bool fits = grads + groups <= cuda::kInlineWords;
  std::vector<uint64_t> many(fits ? 0 : grads + groups);
  uint64_t* words = fits ? args_->words : many.data();
  for (size_t r = 0; r < grads; ++r)
    words[r] = reinterpret_cast<uintptr_t>(table.table.rows[r].data[kGrad]);
  if (groups > 0) std::memcpy(words + grads, table.table.groups.data(), groups * sizeof(uint64_t));
  if (fits) {
    args_->spilled = nullptr;
    return;
  }
  if (args_->spilled != nullptr && same_bytes(many, spilled_)) return;
  args_->spilled = reinterpret_cast<const uint64_t*>(
      upload(table, many.data(), many.size() * sizeof(uint64_t), "words"));
  spilled_ = std::move(many);
}

const cuda::StepArgs& CudaDriver::prepare(const CudaTable& table, const CudaOptions& options) {
  refresh_table(table);
  refresh_words(table);
  cuda::StepArgs& a = *args_;
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
  const CudaTable table = {plan->table(), plan->device_index(), plan->host(),
                           [plan] { plan->hold_grads(); }};
  const cuda::StepArgs& args = prepare(table, options);
  std::string error = cuda::launch(plan->rule(), args, device_, options.stream);
  bool skipped = false;
  const bool may_skip = options.found_inf != nullptr || options.skip_nonfinite;
  if (error.empty() && may_skip && !options.norm_only && plan->has_created_state())
    error = cuda::read_skipped(args.workspace, device_, options.stream, &skipped);
  if (!error.empty()) raise(PyExc_RuntimeError, "the CUDA step failed: " + error);
  return skipped;
}

void CudaDriver::clip(const CudaTable& table, const CudaOptions& options) {
  const cuda::StepArgs& args = prepare(table, options);
  const std::string error = cuda::launch_clip(args, device_, options.stream);
  if (!error.empty()) raise(PyExc_RuntimeError, "clipping on CUDA failed: " + error);
}

}  // namespace fusedopt::host
