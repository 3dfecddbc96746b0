// The CUDA half of lora_ortho._C (lora_ortho/backends/cuda.py). Buffers are the caller's, in device
// memory; streams are addresses.
#include "lora_ortho/cuda.h"

#include "bindings.h"

namespace lora_ortho::bindings {
namespace {

// Sizes and masks of one layer: what every CUDA call takes beside the packed buffer.
class CudaFactors {
public:
    explicit CudaFactors(LayerSizes sizes) : sizes_(std::move(sizes)) {
        require(lora_ortho_cuda_pack_bytes(&factors(), &bytes_));
    }

    void pack(const std::vector<py::tuple>& lora_A, const std::vector<py::tuple>& lora_B,
              Address packed, Address cuda_stream) const {
        const std::vector<lora_ortho_matrix> A = as_matrices(lora_A), B = as_matrices(lora_B);
        const lora_ortho_factors whole = sizes_.with(A, B);
        const py::gil_scoped_release release;
        require(lora_ortho_cuda_pack(&whole, as_pointer(packed), bytes_, as_pointer(cuda_stream)));
    }

    std::size_t forward_bytes(std::int64_t tokens) const {
        std::size_t bytes = 0;
        const lora_ortho_cuda_call call = sizes(tokens);
        require(lora_ortho_cuda_forward_bytes(&factors(), &call, &bytes));
        return bytes;
    }
    std::size_t backward_bytes(std::int64_t tokens) const {
        std::size_t bytes = 0;
        const lora_ortho_cuda_call call = sizes(tokens);
        require(lora_ortho_cuda_backward_bytes(&factors(), &call, &bytes));
        return bytes;
    }

    void forward(Address packed, const py::tuple& x, const std::optional<py::tuple>& base,
                 Address y, Address s, Address workspace, std::size_t workspace_bytes,
                 const py::tuple& call_tuple) const {
        const lora_ortho_cuda_call call = as_call(call_tuple);
        const lora_ortho_matrix x_matrix = as_matrix(x, factors().dtype);
        const lora_ortho_matrix base_matrix =
            base ? as_matrix(*base, factors().dtype) : lora_ortho_matrix{};
        const py::gil_scoped_release release;
        require(lora_ortho_cuda_forward(&factors(), as_pointer(packed), bytes_, &call, &x_matrix,
                                        base ? &base_matrix : nullptr, as_pointer(y), as_pointer(s),
                                        as_pointer(workspace), workspace_bytes));
    }

    void backward(Address packed, const py::tuple& grad, const py::tuple& x, Address s,
                  Address grad_x, Address grad_A, Address grad_B, const std::string& factor_dtype,
                  Address grad_gains, Address workspace, std::size_t workspace_bytes,
                  const py::tuple& call_tuple) const {
        const lora_ortho_cuda_call call = as_call(call_tuple);
        const lora_ortho_matrix grad_matrix = as_matrix(grad, factors().dtype);
        const lora_ortho_matrix x_matrix = as_matrix(x, factors().dtype);
        const lora_ortho_dtype factor = parse("factor_dtype", factor_dtype, kDtypes);
        const py::gil_scoped_release release;
        require(lora_ortho_cuda_backward(
            &factors(), as_pointer(packed), bytes_, &call, &grad_matrix, &x_matrix, as_pointer(s),
            as_pointer(grad_x), as_pointer(grad_A), as_pointer(grad_B), factor,
            static_cast<float*>(as_pointer(grad_gains)), as_pointer(workspace), workspace_bytes));
    }

    std::size_t nbytes() const { return bytes_; }

private:
    // (tokens, gains address, seed, seed address, stream, sample, strata, row_offset, col_offset,
    // CUDA stream)
    static lora_ortho_cuda_call as_call(const py::tuple& t) {
        lora_ortho_cuda_call call{};
        call.struct_version = LORA_ORTHO_STRUCT_VERSION;
        call.tokens = t[0].cast<std::int64_t>();
        call.gains = static_cast<const float*>(as_pointer(t[1].cast<Address>()));
        call.seed = as_seed(t[2].cast<py::int_>());
        call.seed_pointer = static_cast<const std::uint64_t*>(as_pointer(t[3].cast<Address>()));
        call.stream = t[4].cast<std::uint32_t>();
        call.sample = t[5].cast<std::uint32_t>();
        call.strata = t[6].cast<std::uint32_t>();
        call.row_offset = t[7].cast<std::int64_t>();
        call.col_offset = t[8].cast<std::int64_t>();
        call.cuda_stream = as_pointer(t[9].cast<Address>());
        return call;
    }
    // A call of which only the number of tokens matters.
    lora_ortho_cuda_call sizes(std::int64_t tokens) const {
        static const float kNoGains = 0.0f;
        lora_ortho_cuda_call call{};
        call.struct_version = LORA_ORTHO_STRUCT_VERSION;
        call.strata = 1;
        call.tokens = tokens;
        call.gains = &kNoGains;
        return call;
    }

    const lora_ortho_factors& factors() const { return sizes_.factors(); }

    LayerSizes sizes_;
    std::size_t bytes_ = 0;
};

// Why the kernels cannot run on the current device, or None.
std::optional<std::string> cuda_unavailable() {
    const lora_ortho_status status = lora_ortho_cuda_available();
    if (status == LORA_ORTHO_OK) return std::nullopt;
    return lora_ortho_status_text(status);
}

}  // namespace

void bind_cuda(py::module_& m) {
    using py::arg;
    m.def("cuda_unavailable", &cuda_unavailable,
          "Why the CUDA kernels cannot run on the current device; None where they can.");
    py::class_<CudaFactors> factors(m, "CudaFactors", py::module_local(),
                                    "Sizes and masks of one layer for the CUDA kernels.");
    def_init(factors);
    factors
        .def("pack", &CudaFactors::pack, arg("A"), arg("B"), arg("packed_ptr"), arg("cuda_stream"))
        .def("forward_bytes", &CudaFactors::forward_bytes, arg("tokens"))
        .def("backward_bytes", &CudaFactors::backward_bytes, arg("tokens"))
        .def("forward", &CudaFactors::forward, arg("packed_ptr"), arg("x"), arg("base"),
             arg("y_ptr"), arg("s_ptr"), arg("workspace_ptr"), arg("workspace_bytes"), arg("call"))
        .def("backward", &CudaFactors::backward, arg("packed_ptr"), arg("grad"), arg("x"),
             arg("s_ptr"), arg("grad_x_ptr"), arg("grad_A_ptr"), arg("grad_B_ptr"),
             arg("factor_dtype"), arg("grad_gains_ptr"), arg("workspace_ptr"),
             arg("workspace_bytes"), arg("call"))
        .def_property_readonly("nbytes", &CudaFactors::nbytes);
}

}  // namespace lora_ortho::bindings
