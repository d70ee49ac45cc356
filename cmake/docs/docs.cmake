# cca_docs writes the documentation of the public interface to docs/html of the build folder. Any warning fails it.
find_package(Doxygen QUIET)
find_package(Python3 3.11 QUIET COMPONENTS Interpreter)  # tomllib
if(DOXYGEN_FOUND AND Python3_FOUND)
  set(cca_invariants ${PROJECT_BINARY_DIR}/invariants.md)
  configure_file(cmake/docs/Doxyfile.in ${PROJECT_BINARY_DIR}/Doxyfile @ONLY)
  add_custom_target(cca_docs
                    COMMAND Python3::Interpreter cmake/docs/invariants.py tests/mutations.toml . ${cca_invariants}
                    COMMAND Doxygen::doxygen ${PROJECT_BINARY_DIR}/Doxyfile
                    WORKING_DIRECTORY ${PROJECT_SOURCE_DIR} VERBATIM)
else()
  message(STATUS "cca: no target cca_docs, which needs Doxygen and Python 3.11")
endif()
