# The CUDA kernels: csrc/cuda/kernels.cu once per element type. Links the CUDA runtime statically: the
# library then depends on no version of libcudart, loads where there is no driver (the runtime opens
# libcuda itself, when it is first asked), and shares torch's context.
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

# Machine code for the architectures named, and PTX that newer ones compile when it is loaded.
if(NOT LORA_ORTHO_CUDA_ARCHITECTURES)
  set(LORA_ORTHO_CUDA_ARCHITECTURES 80-real 90a-real)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
    list(APPEND LORA_ORTHO_CUDA_ARCHITECTURES 100-real)
  endif()
  list(APPEND LORA_ORTHO_CUDA_ARCHITECTURES 80-virtual)
endif()

set(cuda_targets)
foreach(element Float32 BFloat16 Float16)
  string(TOLOWER ${element} name)
  set(target lora_ortho_cuda_${name})
  add_library(${target} OBJECT cuda/kernels.cu)
  target_compile_definitions(${target} PRIVATE
    LORA_ORTHO_ELEMENT=${element} LORA_ORTHO_ELEMENT_NAME=${name})
  list(APPEND cuda_targets ${target})
endforeach()
add_library(lora_ortho_cuda_device OBJECT cuda/device.cu)
list(APPEND cuda_targets lora_ortho_cuda_device)

foreach(target ${cuda_targets})
  lora_ortho_includes(${target})
  set_target_properties(${target} PROPERTIES
    CUDA_ARCHITECTURES "${LORA_ORTHO_CUDA_ARCHITECTURES}" CUDA_STANDARD 17 CUDA_EXTENSIONS OFF
    CUDA_VISIBILITY_PRESET hidden)
  target_compile_options(${target} PRIVATE -Werror=all-warnings)
  list(APPEND objects $<TARGET_OBJECTS:${target}>)
endforeach()
set(cuda_libraries CUDA::cudart_static)
