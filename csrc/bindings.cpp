// The Python extension lora_ortho._C: raw addresses and numbers in, status codes out as exceptions.
// The CPU half.
// Tensors, dtypes and devices are the caller's business (lora_ortho/backends/cpu.py).
#include <algorithm>
#include <cstring>
#include <memory>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "bindings.h"
#include "cpu/kernels.h"

namespace {

using namespace lora_ortho::bindings;

struct FreeAligned {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t{LORA_ORTHO_ALIGNMENT}); }
};
using AlignedBuffer = std::unique_ptr<void, FreeAligned>;

AlignedBuffer allocate(std::size_t bytes) {
    return AlignedBuffer(::operator new(bytes, std::align_val_t{LORA_ORTHO_ALIGNMENT}));
}

// What every forward and backward call ends with.
lora_ortho_call as_call(std::int64_t tokens, Address gains, const py::int_& seed,
                        std::uint32_t stream, std::uint32_t sample, std::uint32_t strata,
                        std::int64_t row_offset, std::int64_t col_offset, std::int32_t threads) {
    return {LORA_ORTHO_STRUCT_VERSION,
            stream,
            sample,
            strata,
            threads,
            tokens,
            row_offset,
            col_offset,
            as_seed(seed),
            reinterpret_cast<const double*>(gains)};
}

// The packed factors of one layer. Immutable after construction: calls may run at the same time.
class Packed {
public:
    Packed(const LayerSizes& sizes, const std::vector<py::tuple>& lora_A,
           const std::vector<py::tuple>& lora_B, const std::string& isa)
        : dtype_(sizes.factors().dtype) {
        const std::vector<lora_ortho_matrix> A = as_matrices(lora_A), B = as_matrices(lora_B);
        lora_ortho_factors factors = sizes.with(A, B);
        factors.isa = parse("isa", isa, kIsas);
        const py::gil_scoped_release release;
        require(lora_ortho_pack_bytes(&factors, &bytes_));
        buffer_ = allocate(bytes_);
        require(lora_ortho_pack(&factors, buffer_.get(), bytes_));
    }

    void forward(const py::tuple& x, const std::optional<py::tuple>& base, Address y, Address s,
                 std::int64_t tokens, Address gains, const py::int_& seed, std::uint32_t stream,
                 std::uint32_t sample, std::uint32_t strata, std::int64_t row_offset,
                 std::int64_t col_offset, std::int32_t threads) const {
        const lora_ortho_call call =
            as_call(tokens, gains, seed, stream, sample, strata, row_offset, col_offset, threads);
        const lora_ortho_matrix x_matrix = as_matrix(x, dtype_);
        const lora_ortho_matrix base_matrix = base ? as_matrix(*base, dtype_) : lora_ortho_matrix{};
        const py::gil_scoped_release release;
        require(lora_ortho_forward(buffer_.get(), bytes_, &call, &x_matrix,
                                   base ? &base_matrix : nullptr, as_pointer(y), as_pointer(s)));
    }

    void backward(const py::tuple& grad, const py::tuple& x, Address s, Address grad_x,
                  Address grad_A, Address grad_B, const std::string& factor_dtype,
                  Address grad_gains, std::int64_t tokens, Address gains, const py::int_& seed,
                  std::uint32_t stream, std::uint32_t sample, std::uint32_t strata,
                  std::int64_t row_offset, std::int64_t col_offset, std::int32_t threads) const {
        const lora_ortho_call call =
            as_call(tokens, gains, seed, stream, sample, strata, row_offset, col_offset, threads);
        const lora_ortho_matrix grad_matrix = as_matrix(grad, dtype_);
        const lora_ortho_matrix x_matrix = as_matrix(x, dtype_);
        const lora_ortho_dtype factor = parse("factor_dtype", factor_dtype, kDtypes);
        const py::gil_scoped_release release;
        std::size_t needed = 0;
        require(lora_ortho_backward_bytes(buffer_.get(), bytes_, &call, &needed));
        const AlignedBuffer workspace = allocate(needed);
        require(lora_ortho_backward(
            buffer_.get(), bytes_, &call, &grad_matrix, &x_matrix, as_pointer(s),
            as_pointer(grad_x), as_pointer(grad_A), as_pointer(grad_B), factor,
            static_cast<double*>(as_pointer(grad_gains)), workspace.get(), needed));
    }

    std::string isa() const {
        return lora_ortho_isa_name(static_cast<lora_ortho_isa>(header().isa));
    }
    // How y is expanded, and what else runs on tiles: "owner", "tiles, tile shrink", ...
    std::string path() const {
        using namespace lora_ortho::cpu;
        const std::int32_t bits = header().path;
        std::string text = (bits & kExpandMask) == kExpandTiles   ? "tiles"
                           : (bits & kExpandMask) == kExpandOwner ? "owner"
                                                                  : "dense";
        if (bits & kTileShrink) text += ", tile shrink";
        if (bits & kTileBackward) text += ", tile backward";
        return text;
    }
    std::size_t nbytes() const { return bytes_; }

private:
    const lora_ortho::cpu::Header& header() const {
        return *static_cast<const lora_ortho::cpu::Header*>(buffer_.get());
    }

    std::int32_t dtype_;
    std::size_t bytes_ = 0;
    AlignedBuffer buffer_;
};

// A few elements of some matrices, spread over each: a change that moves no version counter is seen
// by them. The matrices' memory must be there when hash is called.
class Sampler {
public:
    // (address, row stride, column stride, rows, columns, bytes of an element); strides in
    // elements.
    explicit Sampler(const std::vector<py::tuple>& matrices) {
        constexpr std::size_t kLeast = 4, kMost = 16, kTogether = 48;
        const std::size_t each =
            std::clamp(kTogether / std::max<std::size_t>(matrices.size(), 1), kLeast, kMost);
        for (const py::tuple& t : matrices) {
            const auto* data = static_cast<const char*>(as_pointer(t[0].cast<Address>()));
            const auto rows = t[3].cast<std::int64_t>(), cols = t[4].cast<std::int64_t>();
            const auto bytes = t[5].cast<std::int64_t>(), elements = rows * cols;
            const auto count = std::min<std::int64_t>(elements, static_cast<std::int64_t>(each));
            for (std::int64_t k = 0; k < count; ++k) {
                // One element of each of `count` equal parts, at a place that the golden ratio
                // spreads.
                const std::int64_t part = elements / count, begin = k * part;
                const std::int64_t at = begin + (k + 1) * 40503 % 65536 * part / 65536;
                const std::int64_t offset =
                    at / cols * t[1].cast<std::int64_t>() + at % cols * t[2].cast<std::int64_t>();
                samples_.push_back({data + offset * bytes, static_cast<std::size_t>(bytes)});
            }
        }
    }

    std::uint64_t hash() const {
        for (const Sample& sample : samples_) __builtin_prefetch(sample.at);
        std::uint64_t h = 0xcbf29ce484222325ull;
        for (const Sample& sample : samples_) {
            h = (h ^ read(sample)) * 0x100000001b3ull;
            h ^= h >> 29;
        }
        return h;
    }

private:
    struct Sample {
        const char* at;
        std::size_t bytes;
    };
    template <class Word>
    static std::uint64_t word(const char* at) {
        Word bits;
        std::memcpy(&bits, at, sizeof bits);
        return bits;
    }
    static std::uint64_t read(const Sample& sample) {
        if (sample.bytes == 4) return word<std::uint32_t>(sample.at);
        return sample.bytes == 2 ? word<std::uint16_t>(sample.at) : word<std::uint64_t>(sample.at);
    }
    std::vector<Sample> samples_;
};

std::vector<std::string> isas() {
    std::vector<std::string> present;
    for (const auto& entry : kIsas) {
        if (entry.value != LORA_ORTHO_ISA_AUTO && lora_ortho_has_isa(entry.value)) {
            present.emplace_back(entry.name);
        }
    }
    return present;
}

py::tuple thresholds(const std::string& method, const std::vector<double>& p) {
    std::vector<std::uint32_t> out(p.size());
    std::vector<double> keep(p.size());
    require(lora_ortho_thresholds(parse("method", method, kMethods),
                                  static_cast<std::int32_t>(p.size()), p.data(), out.data(),
                                  keep.data()));
    return py::make_tuple(out, keep);
}

void draws(const py::int_& seed, std::int64_t row0, std::int64_t rows, std::int64_t col0,
           std::int64_t cols, std::uint32_t stream, std::uint32_t sample, std::uint32_t strata,
           std::uint32_t lane_set, Address out) {
    const std::uint64_t key = as_seed(seed);
    const py::gil_scoped_release release;
    require(lora_ortho_draws(key, row0, rows, col0, cols, stream, sample, strata, lane_set,
                             static_cast<std::uint16_t*>(as_pointer(out))));
}

// Asks for huge pages where a large output will lie: faults on small pages cost more than the
// merge.
void advise_huge_pages(Address start, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const Address page = static_cast<Address>(sysconf(_SC_PAGESIZE));
    const Address begin = (start + page - 1) / page * page, end = (start + bytes) / page * page;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)start, (void)bytes;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    using py::arg;
    m.doc() = "Kernels of lora_ortho. Addresses are ints; nothing here knows of tensors.";
    m.def("version", &lora_ortho_version);
    m.def("best_isa", [] { return lora_ortho_isa_name(lora_ortho_best_isa()); });
    m.def("isas", &isas, "Names of the instruction sets present here, the least first.");
    m.def("thresholds", &thresholds, arg("method"), arg("p"),
          "(thresholds, keep probabilities) of dropout rates; MASK_STREAM.md.");
    m.def("draws", &draws, arg("seed"), arg("row0"), arg("rows"), arg("col0"), arg("cols"),
          arg("stream"), arg("sample"), arg("strata"), arg("lane_set"), arg("out_ptr"),
          "Writes the rows x cols uint16 draws, row-major, to out_ptr.");
    m.def("advise_huge_pages", &advise_huge_pages, arg("ptr"), arg("nbytes"),
          "Asks the system for huge pages in a buffer; does nothing where it has none.");
    py::class_<Packed> packed(m, "Packed", py::module_local(), "The packed factors of one layer.");
    def_init<std::vector<py::tuple>, std::vector<py::tuple>, std::string>(
        packed, arg("A"), arg("B"), arg("isa") = "auto");
    packed
        .def("forward", &Packed::forward, arg("x"), arg("base"), arg("y_ptr"), arg("s_ptr"),
             arg("tokens"), arg("gains_ptr"), arg("seed"), arg("stream"), arg("sample"),
             arg("strata"), arg("row_offset"), arg("col_offset"), arg("threads"))
        .def("backward", &Packed::backward, arg("grad"), arg("x"), arg("s_ptr"), arg("grad_x_ptr"),
             arg("grad_A_ptr"), arg("grad_B_ptr"), arg("factor_dtype"), arg("grad_gains_ptr"),
             arg("tokens"), arg("gains_ptr"), arg("seed"), arg("stream"), arg("sample"),
             arg("strata"), arg("row_offset"), arg("col_offset"), arg("threads"))
        .def_property_readonly("isa", &Packed::isa)
        .def_property_readonly("path", &Packed::path)
        .def_property_readonly("nbytes", &Packed::nbytes);
    py::class_<Sampler>(m, "Sampler", py::module_local(), "A few elements of some matrices.")
        .def(py::init<const std::vector<py::tuple>&>(), arg("matrices"))
        .def("hash", &Sampler::hash, "Of the elements as they are now.");
    bind_cuda(m);
}
