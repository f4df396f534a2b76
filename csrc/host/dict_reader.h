// Reads the same keys out of many dicts of the same make, such as param groups and param states.
#pragma once

#include <cstddef>
#include <vector>

#include "host/python.h"

namespace fusedopt::host {

// Remembers in which order the keys stood in the last dict: one walk over a dict in the same order
// is several times cheaper than a look-up per key. Values are never remembered.
class DictReader {
 public:
  // The names must be interned and live for ever.
  explicit DictReader(std::vector<PyObject*> names) : names_(std::move(names)) {}

  // values[i] is the value of names[i], borrowed, or null where the dict has no such key.
  void read(PyObject* dict, PyObject** values) {
    for (size_t i = 0; i < names_.size(); ++i) values[i] = nullptr;
    PyObject *key, *value;
    Py_ssize_t at = 0;
    for (const Place& place : places_) {
      if (!PyDict_Next(dict, &at, &key, &value) || key != place.key.get())
        return look_up(dict, values);
      if (place.name >= 0) values[place.name] = value;
    }
    if (!complete_ && PyDict_Next(dict, &at, &key, &value)) look_up(dict, values);
  }

  // Lets go of the keys of earlier dicts: objects may die here, which runs Python code. Nothing
  // else of this class does.
  void release() { std::vector<Ref>().swap(dropped_); }

 private:
  struct Place {
    Ref key;
    int name;  // index of the name that stands here, or -1
  };

  // Walks the whole dict, and remembers the order up to the last of the names.
  void look_up(PyObject* dict, PyObject** values) {
    for (Place& place : places_) dropped_.push_back(std::move(place.key));
    places_.clear();
    size_t found = 0, used = 0;
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value);) {
      places_.push_back({Ref::borrow(key), -1});
      if (!PyUnicode_Check(key)) continue;
      for (size_t i = 0; i < names_.size(); ++i) {
        if (key != names_[i] && PyUnicode_Compare(key, names_[i]) != 0) continue;
        places_.back().name = static_cast<int>(i);
        values[i] = value;
        ++found;
        used = places_.size();
      }
    }
    complete_ = found == names_.size();
    while (complete_ && places_.size() > used) {
      dropped_.push_back(std::move(places_.back().key));
      places_.pop_back();
    }
  }

  std::vector<PyObject*> names_;
  std::vector<Place> places_;
  std::vector<Ref> dropped_;
  bool complete_ = false;  // all names stand among the places: what follows does not matter
};

}  // namespace fusedopt::host
