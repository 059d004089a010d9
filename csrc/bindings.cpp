// nova_kernels._native: the one place where C++ meets Python. Arrays come in as NumPy buffers and are never copied; the
// GIL is released while the work is done. Front doors check their inputs and word their errors; what is checked here
// again is what would otherwise read or write past an array.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>

#include "packing/buffer.h"
#include "packing/collate.h"
#include "packing/plan.h"
#include "packing/stream.h"

#ifndef NOVA_SOURCE
#define NOVA_SOURCE "unknown"
#endif

namespace py = pybind11;
using namespace nova::packing;

namespace {

using Int32s = py::array_t<std::int32_t, py::array::c_style>;
using Int64s = py::array_t<std::int64_t, py::array::c_style>;

void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

// A vector as a NumPy array that owns it.
Int64s as_array(std::vector<std::int64_t> values) {
  auto* owned = new std::vector<std::int64_t>(std::move(values));
  const py::capsule owner(owned, [](void* memory) { delete static_cast<std::vector<std::int64_t>*>(memory); });
  return Int64s(static_cast<py::ssize_t>(owned->size()), owned->data(), owner);
}

// An uninitialised NumPy array.
Int64s allocate(std::int64_t size) {
  auto* owned = new Buffer<std::int64_t>(size);
  const py::capsule owner(owned, [](void* memory) { delete static_cast<Buffer<std::int64_t>*>(memory); });
  return Int64s(size, owned->data(), owner);
}

// ---- planning

void require_capacity(std::int64_t capacity) {
  require(capacity >= 1 && capacity <= std::int64_t{1} << 24, "capacity must be 1 ... 2^24");
}

py::tuple plan(const Int32s& lengths, std::int64_t capacity, const std::string& strategy,
               std::optional<std::uint64_t> seed) {
  require_capacity(capacity);
  require(lengths.ndim() == 1, "lengths must be [N]");
  require(lengths.size() <= std::numeric_limits<std::int32_t>::max(), "at most 2^31 - 1 samples");
  require(strategy == "best_fit" || strategy == "search" || strategy == "auto" || strategy == "sequential",
          "unknown strategy");
  const std::int32_t* values = lengths.data();
  const std::int64_t n = lengths.size();
  Int64s order = allocate(n);
  std::int64_t* out = order.mutable_data();
  std::vector<std::int64_t> offsets;
  std::int64_t bound;
  {
    const py::gil_scoped_release nogil;
    const Histogram counts = count(values, n, capacity);
    bound = lower_bound(counts);
    if (strategy == "sequential") {
      offsets = sequential(values, n, capacity, seed, out);
    } else {
      const Runs runs = strategy == "best_fit" ? best_fit(counts)
                        : strategy == "search" ? search(counts)
                                               : best_of_all(counts);
      offsets = deal(runs, counts, values, n, seed, out);
    }
  }
  return py::make_tuple(std::move(order), as_array(std::move(offsets)), bound);
}

// ---- streaming

// Every method works without the GIL and under a lock of its own: threads may share a stream.
class PyStream {
 public:
  PyStream(std::int64_t capacity, std::int64_t window)
      : capacity_(capacity), window_(window), stream_(checked(capacity, window)) {}

  // Numbers of the samples of every pack that closes, one array for each; the samples are numbered as they come.
  py::list push(const Int64s& lengths) {
    require(lengths.ndim() == 1, "lengths must be [N]");
    const std::vector<std::int64_t> values(lengths.data(), lengths.data() + lengths.size());
    for (const std::int64_t length : values)
      require(length >= 1 && length <= capacity_, "lengths must be 1 ... capacity");
    const auto packs = locked([&] {
      std::vector<std::vector<Sample>> closed;
      for (const std::int64_t length : values) {
        stream_.push({pushed_++, length});
        if (stream_.full()) closed.push_back(stream_.close());
      }
      return closed;
    });
    py::list arrays(packs.size());
    for (std::size_t pack = 0; pack < packs.size(); ++pack) arrays[pack] = numbers_of(packs[pack]);
    return arrays;
  }

  // Numbers of the samples of the next pack, however few wait.
  Int64s close() {
    return numbers_of(locked([&] {
      require(!stream_.empty(), "no samples wait");
      return stream_.close();
    }));
  }

  std::int64_t size() {
    return locked([&] { return stream_.size(); });
  }

  std::int64_t pushed() {
    return locked([&] { return pushed_; });
  }

  // The samples that wait, oldest first, and how many have come, of another stream.
  void restore(const Int64s& numbers, const Int64s& lengths, std::int64_t pushed) {
    require(numbers.ndim() == 1 && lengths.ndim() == 1 && numbers.size() == lengths.size(), "expected two [N] arrays");
    require(lengths.size() < window_, "fewer than `window` samples can wait");
    for (py::ssize_t i = 0; i < lengths.size(); ++i)
      require(lengths.data()[i] >= 1 && lengths.data()[i] <= capacity_, "lengths must be 1 ... capacity");
    Stream fresh(capacity_, window_);
    for (py::ssize_t i = 0; i < lengths.size(); ++i) fresh.push({numbers.data()[i], lengths.data()[i]});
    locked([&] {
      stream_ = std::move(fresh);
      pushed_ = pushed;
      return 0;
    });
  }

  std::pair<Int64s, Int64s> waiting() {
    std::vector<std::int64_t> ids, lengths;
    for (const Sample& sample : locked([&] { return stream_.waiting(); })) {
      ids.push_back(sample.id);
      lengths.push_back(sample.length);
    }
    return {as_array(std::move(ids)), as_array(std::move(lengths))};
  }

 private:
  static Stream checked(std::int64_t capacity, std::int64_t window) {
    require_capacity(capacity);
    require(window >= 1 && window <= std::numeric_limits<std::int32_t>::max(), "window must be 1 ... 2^31 - 1");
    return Stream(capacity, window);
  }

  template <class Work>
  auto locked(Work work) -> decltype(work()) {
    const py::gil_scoped_release nogil;
    const std::lock_guard<std::mutex> guard(mutex_);
    return work();
  }

  static Int64s numbers_of(const std::vector<Sample>& pack) {
    Int64s numbers(static_cast<py::ssize_t>(pack.size()));
    for (std::size_t i = 0; i < pack.size(); ++i) numbers.mutable_data()[i] = pack[i].id;
    return numbers;
  }

  std::int64_t capacity_, window_, pushed_ = 0;
  Stream stream_;
  std::mutex mutex_;
};

// ---- collation

std::optional<TokenType> token_type(const py::dtype& dtype) {
  if (dtype.byteorder() == '>' || dtype.byteorder() == '<') return std::nullopt;  // not this machine's order
  const bool is_signed = dtype.kind() == 'i';
  if (!is_signed && dtype.kind() != 'u') return std::nullopt;
  switch (dtype.itemsize()) {
    case 1: return is_signed ? TokenType::int8 : TokenType::uint8;
    case 2: return is_signed ? TokenType::int16 : TokenType::uint16;
    case 4: return is_signed ? TokenType::int32 : TokenType::uint32;
    default: return is_signed ? std::optional(TokenType::int64) : std::nullopt;
  }
}

bool is_contiguous(const py::array& array) {
  constexpr int wanted = py::array::c_style | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
  return (array.flags() & wanted) == wanted;
}

// The items of a list, each by `read`, which says whether it could.
template <class T, class Read>
std::optional<py::array> read_items(PyObject* list, Read read) {
  const Py_ssize_t size = PyList_GET_SIZE(list);
  py::array_t<T> values(size);
  T* out = values.mutable_data();
  for (Py_ssize_t i = 0; i < size; ++i)
    if (!read(PyList_GET_ITEM(list, i), out[i])) return std::nullopt;
  return values;
}

// A list of integers, of floats or of truth values as an array; nothing if they are mixed, or there is anything else.
std::optional<py::array> read_list(PyObject* list) {
  PyObject* first = PyList_GET_SIZE(list) > 0 ? PyList_GET_ITEM(list, 0) : nullptr;
  if (first != nullptr && PyBool_Check(first))
    return read_items<bool>(list, [](PyObject* item, bool& out) {
      out = item == Py_True;
      return PyBool_Check(item);
    });
  if (first != nullptr && PyFloat_CheckExact(first))
    return read_items<double>(list, [](PyObject* item, double& out) {
      if (!PyFloat_CheckExact(item)) return false;
      out = PyFloat_AS_DOUBLE(item);
      return true;
    });
  return read_items<std::int64_t>(list, [](PyObject* item, std::int64_t& out) {
    if (!PyLong_CheckExact(item)) return false;
    int overflow = 0;
    out = PyLong_AsLongLongAndOverflow(item, &overflow);
    return overflow == 0;
  });
}

// What is needed of libraries that are not known here: torch.Tensor, torch.Tensor.numpy, numpy.asarray.
struct Readers {
  py::object tensor, to_numpy, asarray;
};

// An array, a list of numbers, a tensor, or what np.asarray reads through __array__.
std::optional<py::array> read_array(PyObject* value, const Readers& readers) {
  if (PyList_CheckExact(value)) return read_list(value);
  auto array = py::reinterpret_borrow<py::object>(value);
  if (!py::isinstance<py::array>(array)) {
    const bool is_tensor = reinterpret_cast<PyObject*>(Py_TYPE(value)) == readers.tensor.ptr();
    if (!is_tensor && !py::hasattr(array, "__array__")) return std::nullopt;
    try {
      array = is_tensor ? readers.to_numpy(array) : readers.asarray(array);
    } catch (const py::error_already_set& error) {
      if (!error.matches(PyExc_Exception)) throw;  // the user wants to stop
      return std::nullopt;                         // a tensor on another device, or of a type that NumPy lacks
    }
  }
  return py::reinterpret_borrow<py::array>(array);
}

// The fields of dictionaries, one list of arrays per name; nothing where a sample has other fields or values.
std::optional<std::vector<py::list>> read_rows(const py::list& samples, const py::list& names,
                                               const py::object& tensor, const py::object& to_numpy,
                                               const py::object& asarray) {
  const Readers readers{tensor, to_numpy, asarray};
  std::vector<py::list> columns;
  for (std::size_t field = 0; field < names.size(); ++field) columns.emplace_back(samples.size());
  for (std::size_t sample = 0; sample < samples.size(); ++sample) {
    const py::object fields = samples[sample];
    if (!PyDict_CheckExact(fields.ptr()) || PyDict_GET_SIZE(fields.ptr()) != static_cast<Py_ssize_t>(names.size()))
      return std::nullopt;
    for (std::size_t field = 0; field < names.size(); ++field) {
      const auto value = py::reinterpret_borrow<py::object>(
          PyDict_GetItemWithError(fields.ptr(), PyList_GET_ITEM(names.ptr(), field)));
      if (!value) {
        if (PyErr_Occurred()) throw py::error_already_set();
        return std::nullopt;
      }
      std::optional<py::array> array = read_array(value.ptr(), readers);
      if (!array) return std::nullopt;
      columns[field][sample] = std::move(*array);
    }
  }
  return columns;
}

// Whether lay_out and concatenate can take these columns: contiguous arrays, equally long within a sample and not empty;
// in the first `token_columns` of them integers [l], in the others one type and one shape behind the first dimension.
bool are_regular(const std::vector<py::list>& columns, std::size_t token_columns) {
  for (std::size_t field = 0; field < columns.size(); ++field) {
    if (columns[field].size() != columns[0].size()) return false;
    py::array first;
    for (std::size_t sample = 0; sample < columns[0].size(); ++sample) {
      const py::object item = columns[field][sample];
      if (!py::isinstance<py::array>(item)) return false;
      const auto array = py::reinterpret_borrow<py::array>(item);
      if (array.ndim() == 0 || !is_contiguous(array) || array.shape(0) == 0) return false;
      if (field > 0 && array.shape(0) != py::reinterpret_borrow<py::array>(columns[0][sample]).shape(0)) return false;
      if (field < token_columns) {
        if (array.ndim() != 1 || !token_type(array.dtype())) return false;
        continue;
      }
      if (sample == 0) {
        first = array;
        const bool is_number = std::string("iufcb").find(array.dtype().kind()) != std::string::npos;
        if (!is_number || array.dtype().byteorder() == '>' || array.dtype().byteorder() == '<') return false;
      }
      if (array.ndim() != first.ndim() || !array.dtype().equal(first.dtype())) return false;
      if (!std::equal(array.shape() + 1, array.shape() + array.ndim(), first.shape() + 1)) return false;
    }
  }
  return true;
}

std::vector<Tokens> tokens_of(const py::list& arrays) {
  std::vector<Tokens> tokens;
  tokens.reserve(arrays.size());
  for (const py::handle item : arrays) {
    const auto array = py::reinterpret_borrow<py::array>(item);
    require(py::isinstance<py::array>(item) && array.ndim() == 1 && is_contiguous(array), "expected contiguous [l] arrays");
    const std::optional<TokenType> type = token_type(array.dtype());
    require(type.has_value() && array.size() > 0, "expected integers, at least one");
    tokens.push_back({array.data(), array.size(), *type});
  }
  return tokens;
}

std::int64_t lay_out_row(const py::list& ids, const std::optional<py::list>& labels, Int64s input_ids, Int64s labels_out,
                         Int64s position_ids, Int32s cu_seqlens) {
  const std::vector<Tokens> tokens = tokens_of(ids);
  std::optional<std::vector<Tokens>> targets;
  if (labels) targets = tokens_of(*labels);
  const std::int64_t total = input_ids.size();
  std::int64_t used = 0;
  for (std::size_t sample = 0; sample < tokens.size(); ++sample) {
    used += tokens[sample].length;
    require(!targets || (targets->size() == tokens.size() && (*targets)[sample].length == tokens[sample].length),
            "labels must be as long as input_ids");
  }
  require(used <= total && total <= std::numeric_limits<std::int32_t>::max(), "the tokens must fit in the row");
  require(labels_out.size() == total && position_ids.size() == total, "the outputs must be of one size");
  require(cu_seqlens.size() == static_cast<py::ssize_t>(tokens.size()) + (used < total ? 2 : 1),
          "cu_seqlens must have one entry per segment and one more");
  const Row row{input_ids.mutable_data(), labels_out.mutable_data(), position_ids.mutable_data(),
                cu_seqlens.mutable_data()};
  const py::gil_scoped_release nogil;
  return lay_out(tokens, targets ? &*targets : nullptr, total, row);
}

void concatenate_arrays(const py::list& arrays, py::array out) {
  std::vector<Bytes> pieces;
  pieces.reserve(arrays.size());
  std::int64_t used = 0;
  for (const py::handle item : arrays) {
    const auto array = py::reinterpret_borrow<py::array>(item);
    require(py::isinstance<py::array>(item) && is_contiguous(array), "expected contiguous arrays");
    require(array.dtype().equal(out.dtype()), "expected arrays of the output's type");
    pieces.push_back({array.data(), array.nbytes()});
    used += array.nbytes();
  }
  require(is_contiguous(out) && used <= out.nbytes(), "the arrays must fit in the output");
  void* const data = out.mutable_data();
  const std::int64_t total = out.nbytes();
  const py::gil_scoped_release nogil;
  concatenate(pieces, total, data);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "C++ parts of nova_kernels; called through the front doors of its packages.";
  module.attr("source") = NOVA_SOURCE;  // a hash of csrc/, see setup.py
  module.def("plan", &plan, py::arg("lengths").noconvert(), py::arg("capacity"), py::arg("strategy"), py::arg("seed"),
             "Lengths -> (order, offsets, lower bound).");
  py::class_<PyStream>(module, "Stream")
      .def(py::init<std::int64_t, std::int64_t>(), py::arg("capacity"), py::arg("window"))
      .def("push", &PyStream::push, py::arg("lengths").noconvert())
      .def("pushed", &PyStream::pushed)
      .def("restore", &PyStream::restore, py::arg("numbers").noconvert(), py::arg("lengths").noconvert(),
           py::arg("pushed"))
      .def("close", &PyStream::close)
      .def("__len__", &PyStream::size)
      .def("waiting", &PyStream::waiting, "Numbers and lengths of the samples that wait, oldest first.");
  module.def("read_rows", &read_rows, py::arg("samples"), py::arg("names"), py::arg("tensor"),
             py::arg("to_numpy"), py::arg("asarray"),
             "The samples' fields, one list of arrays per name; None where they are not plain and alike.");
  module.def("are_regular", &are_regular, py::arg("columns"), py::arg("token_columns"),
             "Whether lay_out and concatenate can take these columns.");
  module.def("lay_out", &lay_out_row, py::arg("ids"), py::arg("labels"), py::arg("input_ids").noconvert(),
             py::arg("labels_out").noconvert(), py::arg("position_ids").noconvert(), py::arg("cu_seqlens").noconvert(),
             "Write one row; returns the length of its longest segment.");
  module.def("concatenate", &concatenate_arrays, py::arg("arrays"), py::arg("out").noconvert(),
             "Write one field; what is left over is zero.");
}
