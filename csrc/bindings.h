// What the two halves of the Python extension share: names, addresses, statuses as exceptions.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

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
