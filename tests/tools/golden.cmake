# cmake -D PROGRAM=.. -D GOLDEN=.. -P golden.cmake: what the program prints is what the file holds. Times differ from run to
# run: a number of seconds counts as "... s".

cmake_minimum_required(VERSION 3.25)

execute_process(COMMAND ${PROGRAM} OUTPUT_VARIABLE printed COMMAND_ERROR_IS_FATAL ANY)
string(REGEX REPLACE "[0-9]+\\.[0-9]+ s" "... s" printed "${printed}")
file(READ ${GOLDEN} golden)
if(NOT printed STREQUAL golden)
  message(FATAL_ERROR "printed:\n${printed}\n${GOLDEN} holds:\n${golden}")
endif()
