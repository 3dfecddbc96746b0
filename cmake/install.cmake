# cmake --install: headers, libraries, find_package(lora_ortho) and pkg-config.
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/lora_ortho)
install(DIRECTORY ${PROJECT_SOURCE_DIR}/csrc/include/lora_ortho
        DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.h")
install(TARGETS ${libraries} EXPORT lora_ortho_targets
        LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
        ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
        RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR}
        INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT lora_ortho_targets NAMESPACE lora_ortho:: DESTINATION ${package_dir})

configure_package_config_file(
  ${PROJECT_SOURCE_DIR}/cmake/lora_orthoConfig.cmake.in
  ${PROJECT_BINARY_DIR}/lora_orthoConfig.cmake INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(
  ${PROJECT_BINARY_DIR}/lora_orthoConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/lora_orthoConfig.cmake
              ${PROJECT_BINARY_DIR}/lora_orthoConfigVersion.cmake DESTINATION ${package_dir})

# Paths relative to the .pc file, so that the prefix can be moved.
file(RELATIVE_PATH pc_to_prefix /prefix/${CMAKE_INSTALL_LIBDIR}/pkgconfig /prefix)
if(OpenMP_CXX_FOUND)
  set(pc_openmp ${OpenMP_CXX_FLAGS})
endif()
if(LORA_ORTHO_CUDA)
  set(pc_cuda "-L${CUDAToolkit_LIBRARY_DIR} -lcudart_static -lrt -lpthread -ldl")
endif()
configure_file(${PROJECT_SOURCE_DIR}/cmake/lora_ortho.pc.in
               ${PROJECT_BINARY_DIR}/lora_ortho.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/lora_ortho.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
