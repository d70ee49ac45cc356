include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

# Nothing in the package depends on the processor, hence share/, not lib/.
set(cca_package_dir ${CMAKE_INSTALL_DATADIR}/cmake/cca)

install(DIRECTORY include/ DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(TARGETS cca EXPORT cca)
install(EXPORT cca NAMESPACE cca:: FILE cca-targets.cmake DESTINATION ${cca_package_dir})

configure_package_config_file(cmake/cca-config.cmake.in ${PROJECT_BINARY_DIR}/cca-config.cmake
                              INSTALL_DESTINATION ${cca_package_dir})
# Before 1.0 a new minor version may break its users.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/cca-config-version.cmake
                                 COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES ${PROJECT_BINARY_DIR}/cca-config.cmake ${PROJECT_BINARY_DIR}/cca-config-version.cmake
              cmake/Findxsimd.cmake
        DESTINATION ${cca_package_dir})
