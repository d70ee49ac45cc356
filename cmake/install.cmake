include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

# Nothing in the package depends on the processor, hence share/, not lib/.
set(cca_package_dir ${CMAKE_INSTALL_DATADIR}/cmake/cca)
set(cca_pkgconfig_dir ${CMAKE_INSTALL_DATADIR}/pkgconfig)

install(DIRECTORY include/ DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(TARGETS cca EXPORT cca INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT cca NAMESPACE cca:: FILE cca-targets.cmake DESTINATION ${cca_package_dir})

configure_package_config_file(cmake/cca-config.cmake.in ${PROJECT_BINARY_DIR}/cca-config.cmake
                              INSTALL_DESTINATION ${cca_package_dir})
# Before 1.0 a new minor version may break its users.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/cca-config-version.cmake
                                 COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES ${PROJECT_BINARY_DIR}/cca-config.cmake ${PROJECT_BINARY_DIR}/cca-config-version.cmake
              cmake/Findxsimd.cmake cmake/cca-hints.cmake cmake/dispatch.cmake cmake/mpi.cmake
        DESTINATION ${cca_package_dir})

# Relative to itself, so that an installed tree may be moved.
cmake_path(ABSOLUTE_PATH cca_pkgconfig_dir BASE_DIRECTORY ${CMAKE_INSTALL_PREFIX} OUTPUT_VARIABLE cca_from)
cmake_path(RELATIVE_PATH CMAKE_INSTALL_FULL_INCLUDEDIR BASE_DIRECTORY ${cca_from} OUTPUT_VARIABLE cca_include_from_pc)
configure_file(cmake/cca.pc.in ${PROJECT_BINARY_DIR}/cca.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/cca.pc DESTINATION ${cca_pkgconfig_dir})
