// Reads the hyperparameters of a param group.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include "core/dlpack_abi.h"
#include "core/table.h"
#include "host/dict_reader.h"
#include "host/python.h"
#include "rules/rule.h"

namespace fusedopt::host {

inline constexpr int kOptions = 5;  // of the whole optimizer: fusedopt/options.py

class GroupReader {
 public:
  // The keys in the order of the rule's Hyper struct, and the ranges of their values; "betas[2]" is
  // a pair. With `on_device`, an lr that is a tensor on that kind of device is left there, and its
  // address taken.
  GroupReader(const std::vector<std::string>& hyper_keys, const std::vector<Range>& ranges,
              std::optional<dlpack::DeviceType> on_device);

  // Fills in `out` and returns group["params"] as a list or tuple. Raises KeyError for what is
  // missing, TypeError for what is no number, ValueError for a number out of its range, or an
  // option of the whole optimizer that is not that of the group before; `index` counts the groups.
  Ref read(PyObject* group, size_t index, Group* out);

 private:
  bool take_address(PyObject* lr, Group* out) const;
  // `values`: kOptions, null where the group has none.
  void compare_options(PyObject* const* values, size_t index);

  struct Key {
    PyObject* name;
    int count;
    Range range;
  };

  std::vector<Key> keys_;
  std::optional<dlpack::DeviceType> on_device_;
  DictReader reader_;      // "params", "maximize", the options, the keys
  Ref options_[kOptions];  // of the groups of this table that were read, where they have them
};

}  // namespace fusedopt::host
