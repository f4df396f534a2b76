#include "host/device_table.h"

#include <cstddef>
#include <cstring>
#include <utility>

namespace fusedopt::host {
namespace {

constexpr size_t kGroupWords = sizeof(Group) / sizeof(uint64_t);
static_assert(sizeof(Group) % sizeof(uint64_t) == 0);

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

// But for their gradients. A copy without them would be a megabyte for ten thousand tensors.
bool same_rows(const std::vector<Row>& a, const std::vector<Row>& b) {
  if (a.size() != b.size()) return false;
  constexpr size_t kFrom = offsetof(Row, data) + kGrad * sizeof(void*), kTo = kFrom + sizeof(void*);
  for (size_t r = 0; r < a.size(); ++r) {
    const auto* x = reinterpret_cast<const char*>(&a[r]);
    const auto* y = reinterpret_cast<const char*>(&b[r]);
    if (std::memcmp(x, y, kFrom) != 0 || std::memcmp(x + kTo, y + kTo, sizeof(Row) - kTo) != 0)
      return false;
  }
  return true;
}

}  // namespace

uintptr_t DeviceTable::upload(const TableSource& source, const void* from, size_t bytes,
                              const char* slot) {
  source.before_python();
  ++uploads_;
  const auto address = static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(from));
  const Ref there = Ref::checked(PyObject_CallMethod(source.host, "upload", "KKs", address,
                                                     static_cast<unsigned long long>(bytes), slot));
  void* const result = PyLong_AsVoidPtr(there.get());
  if (PyErr_Occurred()) throw PythonError{};
  return reinterpret_cast<uintptr_t>(result);
}

bool DeviceTable::refresh(const TableSource& source) {
  if (device_ == source.device && same_rows(source.table.rows, rows_) &&
      same_bytes(source.table.layouts, layouts_))
    return false;
  std::vector<Row> rows = source.table.rows;
  for (Row& row : rows) row.data[kGrad] = nullptr;
  std::vector<ChunkRef> chunks;
  for (size_t r = 0; r < rows.size(); ++r)
    for (int64_t begin = 0; begin < rows[r].numel; begin += chunk_)
      chunks.push_back({static_cast<int32_t>(r), static_cast<int32_t>(begin / chunk_)});
  Image image;
  const size_t rows_at = image.add(rows), chunks_at = image.add(chunks),
               layouts_at = image.add(source.table.layouts);
  device_ = -1;  // until it is there
  const uintptr_t base = upload(source, image.bytes().data(), image.bytes().size(), "table");
  rows_at_ = base + rows_at;
  chunks_at_ = base + chunks_at;
  layouts_at_ = base + layouts_at;
  chunk_count_ = static_cast<int32_t>(chunks.size());
  rows_ = std::move(rows);
  layouts_ = source.table.layouts;
  words_.clear();
  device_ = source.device;
  return true;
}

void DeviceTable::end_first_step() {
  for (Row& row : rows_) row.first = 0;
}

size_t DeviceTable::word_count(const TableView& table) {
  return table.rows.size() + table.groups.size() * kGroupWords;
}

void DeviceTable::write_words(const TableView& table, uint64_t* out) {
  for (const Row& row : table.rows) *out++ = reinterpret_cast<uintptr_t>(row.data[kGrad]);
  if (!table.groups.empty())
    std::memcpy(out, table.groups.data(), table.groups.size() * sizeof(Group));
}

uintptr_t DeviceTable::upload_words(const TableSource& source) {
  next_words_.resize(word_count(source.table));
  write_words(source.table, next_words_.data());
  if (words_.empty() || !same_bytes(next_words_, words_)) {
    words_.clear();
    words_at_ = upload(source, next_words_.data(), next_words_.size() * sizeof(uint64_t), "words");
    words_.swap(next_words_);
  }
  return words_at_;
}

}  // namespace fusedopt::host
