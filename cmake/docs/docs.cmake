# cca_docs writes the documentation of the public interface to docs/html of the build folder. Any warning fails it.
find_package(Doxygen QUIET)
if(DOXYGEN_FOUND)
  configure_file(cmake/docs/Doxyfile.in ${PROJECT_BINARY_DIR}/Doxyfile @ONLY)
  add_custom_target(cca_docs COMMAND Doxygen::doxygen ${PROJECT_BINARY_DIR}/Doxyfile
                    WORKING_DIRECTORY ${PROJECT_SOURCE_DIR} VERBATIM)
else()
  message(STATUS "cca: no target cca_docs, since Doxygen is not installed")
endif()
