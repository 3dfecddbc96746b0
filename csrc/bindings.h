// What the two halves of the Python extension share: names, addresses, statuses as exceptions.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/draw.h"
#include "lora_ortho/lora_ortho.h"

namespace py = pybind11;

namespace lora_ortho::bindings {

using Address = std::uintptr_t;

inline void require(lora_ortho_status status) {
    if (status == LORA_ORTHO_OK) return;
    const char* text = lora_ortho_status_text(status);
    if (status == LORA_ORTHO_OUT_OF_MEMORY) throw std::bad_alloc();
    if (status == LORA_ORTHO_INTERNAL_ERROR) throw std::runtime_error(text);
    throw py::value_error(text);
}

template <class Enum>
struct Name {
    const char* name;
    Enum value;
};
constexpr Name<lora_ortho_method> kMethods[] = {{"orthogonal", LORA_ORTHO_ORTHOGONAL},
                                                {"dropout", LORA_ORTHO_DROPOUT},
                                                {"direct", LORA_ORTHO_DIRECT}};
constexpr Name<lora_ortho_dtype> kDtypes[] = {{"float32", LORA_ORTHO_FLOAT32},
                                              {"bfloat16", LORA_ORTHO_BFLOAT16},
                                              {"float16", LORA_ORTHO_FLOAT16},
                                              {"float64", LORA_ORTHO_FLOAT64}};
constexpr Name<lora_ortho_isa> kIsas[] = {{"auto", LORA_ORTHO_ISA_AUTO},
                                          {"baseline", LORA_ORTHO_ISA_BASELINE},
                                          {"avx2", LORA_ORTHO_ISA_AVX2},
                                          {"avx512", LORA_ORTHO_ISA_AVX512},
                                          {"avx512_bf16", LORA_ORTHO_ISA_AVX512_BF16},
                                          {"amx", LORA_ORTHO_ISA_AMX}};

template <class Enum, std::size_t N>
Enum parse(const char* what, const std::string& text, const Name<Enum> (&names)[N]) {
    std::string known;
    for (const auto& entry : names) {
        if (text == entry.name) return entry.value;
        known += known.empty() ? entry.name : std::string(", ") + entry.name;
    }
    throw py::value_error(std::string(what) + " is '" + text + "'; it may be one of " + known);
}

// (address, row stride, column stride); strides in elements.
inline lora_ortho_matrix as_matrix(const py::tuple& t, std::int32_t dtype) {
    return {reinterpret_cast<const void*>(t[0].cast<Address>()), t[1].cast<std::int64_t>(),
            t[2].cast<std::int64_t>(), dtype};
}

// (address, row stride, column stride, dtype)
inline std::vector<lora_ortho_matrix> as_matrices(const std::vector<py::tuple>& tuples) {
    std::vector<lora_ortho_matrix> matrices;
    for (const py::tuple& t : tuples) {
        matrices.push_back(as_matrix(t, parse("dtype", t[3].cast<std::string>(), kDtypes)));
    }
    return matrices;
}

// The sizes and thresholds of a layer, and what they point to: the factors without their matrices.
class LayerSizes {
public:
    LayerSizes(lora_ortho_method method, lora_ortho_dtype dtype, std::int64_t d_in,
               std::int64_t d_out, std::vector<std::int64_t> ranks,
               std::vector<std::uint32_t> thresholds)
        : ranks_(std::move(ranks)), thresholds_(std::move(thresholds)) {
        factors_.struct_version = LORA_ORTHO_STRUCT_VERSION;
        factors_.method = method;
        factors_.dtype = dtype;
        factors_.adapters = static_cast<std::int32_t>(ranks_.size());
        factors_.d_in = d_in;
        factors_.d_out = d_out;
        factors_.ranks = ranks_.data();
        factors_.thresholds = thresholds_.data();
        if (draw_of(factors_) != Draw::kNone && thresholds_.size() != ranks_.size()) {
            throw py::value_error("ranks and thresholds differ in length");
        }
    }
    LayerSizes(LayerSizes&&) = default;

    const lora_ortho_factors& factors() const { return factors_; }
    // With matrices, which live as long as A and B do.
    lora_ortho_factors with(const std::vector<lora_ortho_matrix>& A,
                            const std::vector<lora_ortho_matrix>& B) const {
        if (A.size() != ranks_.size() || B.size() != ranks_.size()) {
            throw py::value_error("ranks, lora_A and lora_B differ in length");
        }
        lora_ortho_factors factors = factors_;
        factors.lora_A = A.data();
        factors.lora_B = B.data();
        return factors;
    }

private:
    std::vector<std::int64_t> ranks_;
    std::vector<std::uint32_t> thresholds_;
    lora_ortho_factors factors_{};
};

// Gives a Python class whose constructor takes LayerSizes and More an __init__ of their numbers.
template <class... More, class Class, class... Names>
void def_init(py::class_<Class>& c, const Names&... names) {
    using py::arg;
    c.def(py::init([](const std::string& method, const std::string& dtype, std::int64_t d_in,
                      std::int64_t d_out, std::vector<std::int64_t> ranks,
                      std::vector<std::uint32_t> thresholds, const More&... more) {
              return std::make_unique<Class>(
                  LayerSizes(parse("method", method, kMethods), parse("dtype", dtype, kDtypes),
                             d_in, d_out, std::move(ranks), std::move(thresholds)),
                  more...);
          }),
          arg("method"), arg("dtype"), arg("d_in"), arg("d_out"), arg("ranks"), arg("thresholds"),
          names...);
}

inline void* as_pointer(Address address) { return reinterpret_cast<void*>(address); }

// The low 64 bits of any Python int: a negative seed is read as its two's complement.
inline std::uint64_t as_seed(const py::int_& seed) {
    const std::uint64_t value = PyLong_AsUnsignedLongLongMask(seed.ptr());
    if (PyErr_Occurred()) throw py::error_already_set();
    return value;
}

// Adds the CUDA half (bindings_cuda.cpp) to the module.
void bind_cuda(py::module_& m);

}  // namespace lora_ortho::bindings
