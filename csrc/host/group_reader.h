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

// Options of the whole optimizer: fusedopt/options.py.
inline constexpr int kOptions = 5;
inline constexpr const char* kOptionNames[kOptions] = {
    "max_grad_norm", "clip_grad_value", "skip_nonfinite", "process_group", "backend"};

class GroupReader {
 public:
  // The keys in the order of the rule's Hyper struct, and the ranges of their values; "betas[2]" is
  // a pair. With `on_device`, an lr that is a tensor on that kind of device is left there, and its
  // address taken; fetch() is for those that then turn out to lie on another device than the
  // params.
  GroupReader(const std::vector<std::string>& hyper_keys, const std::vector<Range>& ranges,
              std::optional<dlpack::DeviceType> on_device);

  // Fills in `out` and returns group["params"] as a list or tuple. Raises KeyError for what is
  // missing, TypeError for what is no number, ValueError for a number out of its range, or an
  // option of the whole optimizer that is not that of the group before; `index` counts the groups.
  Ref read(PyObject* group, size_t index, Group* out);

  // Forgets the tensors of the reads before.
  void begin() { on_devices_.clear(); }
  // Whether a row of a group has its lr on another device than `device`, where the params are.
  bool must_fetch(const std::vector<Row>& rows, int device) const;
  // Reads these by value: host.fetch_lr(lr, index) returns a float.
  void fetch(const std::vector<Row>& rows, int device, PyObject* host,
             std::vector<Group>* groups) const;

 private:
  bool take_address(PyObject* lr, size_t index, Group* out);
  // `values`: kOptions, null where the group has none.
  void compare_options(PyObject* const* values, size_t index);

  struct Key {
    PyObject* name;
    int count;
    Range range;
  };

  // An lr whose address was taken.
  struct OnDevice {
    Ref lr;
    size_t group;
    int device;
  };
  bool fetches(const OnDevice& lr, const std::vector<Row>& rows, int device) const;

  std::vector<Key> keys_;
  std::vector<OnDevice> on_devices_;
  std::optional<dlpack::DeviceType> on_device_;
  DictReader reader_;      // "params", "maximize", the options, the keys
  Ref options_[kOptions];  // of the groups of this table that were read, where they have them
};

}  // namespace fusedopt::host
