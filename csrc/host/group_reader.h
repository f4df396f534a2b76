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

namespace fusedopt::host {

class GroupReader {
 public:
  // The keys in the order of the rule's Hyper struct; "betas[2]" is a pair. With `on_device`, an lr
  // that is a tensor on that kind of device is left there, and its address taken; fetch() is for
  // those that then turn out to lie on another device than the params.
  GroupReader(const std::vector<std::string>& hyper_keys,
              std::optional<dlpack::DeviceType> on_device);

  // Fills in `out` and returns group["params"] as a list or tuple. Raises KeyError for what is
  // missing, TypeError for what is no number; `index` is for the message.
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

  struct Key {
    PyObject* name;
    int count;
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
  DictReader reader_;  // "params", "maximize", the keys
};

}  // namespace fusedopt::host
