#include "host/triton_step.h"

#include <cstddef>
#include <set>

namespace fusedopt::host {
namespace {

// triton_kernels/table.py reads the table as 64-bit words.
static_assert(sizeof(Row) == 80 && offsetof(Row, step) == 40 && offsetof(Row, numel) == 48);
static_assert(offsetof(Row, group) == 56 && offsetof(Row, layout) == 60);
static_assert(offsetof(Row, dtype) == 64 && offsetof(Row, variant) == 69);
static_assert(offsetof(Row, states) == 70 && offsetof(Row, first) == 71);
static_assert(sizeof(Group) == 8 * (kMaxHyper + 2) && offsetof(Group, lr) == 96);
static_assert(offsetof(Group, lr_dtype) == 104 && offsetof(Group, maximize) == 105);
static_assert(sizeof(Layout) == 8 * (1 + kMaxDims * (1 + kOperands)) && kMaxDims == 64);
static_assert(offsetof(Layout, size) == 8 && offsetof(Layout, stride) == 520);

// What decides which code a row runs through: bytes 0 to 4 the dtypes, 5 the rule's variant, 6 the
// number of states, 7 whether it is strided.
uint64_t kind_of(const Row& row) {
  uint64_t kind = 0;
  for (int k = 0; k < kState0 + row.states; ++k)
    kind |= static_cast<uint64_t>(row.dtype[k]) << (8 * k);
  kind |= static_cast<uint64_t>(row.variant) << 40 | static_cast<uint64_t>(row.states) << 48;
  return kind | static_cast<uint64_t>(row.layout != kFlat) << 56;
}

Ref kinds_of(const std::vector<Row>& rows) {
  std::set<uint64_t> kinds;
  for (const Row& row : rows)
    if (row.numel > 0) kinds.insert(kind_of(row));
  Ref tuple = Ref::checked(PyTuple_New(static_cast<Py_ssize_t>(kinds.size())));
  Py_ssize_t i = 0;
  for (const uint64_t kind : kinds) {
    PyObject* number = PyLong_FromUnsignedLongLong(kind);
    if (number == nullptr) throw PythonError{};
    PyTuple_SET_ITEM(tuple.get(), i++, number);
  }
  return tuple;
}

}  // namespace

bool TritonDriver::launch(Plan* plan) {
  if (plan->rows() == 0) return false;
  const TableSource source = plan->source();
  if (table_.refresh(source) || !kinds_) kinds_ = kinds_of(source.table.rows);
  const uintptr_t words = table_.upload_words(source);
  source.before_python();
  const auto address = [](uintptr_t at) { return static_cast<unsigned long long>(at); };
  const Ref skipped = Ref::checked(PyObject_CallMethod(
      source.host, "launch", "KKKKiiOO", address(table_.rows()), address(table_.layouts()),
      address(table_.chunks()), address(words), table_.row_count(), table_.chunk_count(),
      kinds_.get(), plan->has_created_state() ? Py_True : Py_False));
  const int result = PyObject_IsTrue(skipped.get());
  if (result < 0) throw PythonError{};
  return result != 0;
}

}  // namespace fusedopt::host
