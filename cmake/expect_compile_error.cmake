# Passes if SOURCE does not compile, with an error that matches the expression after `// expect: `
# in it, and does compile with CONCERTINA_CONTROL defined; so the forbidden line alone is to blame.
# A line `// clang: FLAGS` is for what only Clang refuses, with these flags; other compilers skip it.
# PRECOMPILED is a header that lies precompiled beside itself, with these directories and no flags.
#   cmake -D COMPILER=g++ -D SOURCE=file.cpp -D "INCLUDES=dir;dir" -D PRECOMPILED=headers.hpp \
#     -P expect_compile_error.cmake

file(READ ${SOURCE} text)
if(NOT text MATCHES "// expect: ([^\n]+)")
  message(FATAL_ERROR "${SOURCE} has no line `// expect: REGEX`")
endif()
set(expected "${CMAKE_MATCH_1}")
foreach(part "#ifdef CONCERTINA_CONTROL" "#else")
  if(NOT text MATCHES "${part}")
    message(FATAL_ERROR "${SOURCE} has no ${part}, hence no line to compare with")
  endif()
endforeach()

set(command ${COMPILER} -std=c++20 -fsyntax-only -include ${PRECOMPILED})
if(text MATCHES "// clang: ([^\n]+)")
  list(APPEND command ${CMAKE_MATCH_1})
  if(NOT COMPILER MATCHES "clang")
    message("skipped: only Clang refuses it")
    return()
  endif()
endif()
foreach(directory IN LISTS INCLUDES)
  list(APPEND command -isystem ${directory})
endforeach()
set(ENV{LC_ALL} C)

execute_process(COMMAND ${command} -DCONCERTINA_CONTROL ${SOURCE}
                RESULT_VARIABLE control ERROR_VARIABLE control_output)
if(NOT control EQUAL 0)
  message(FATAL_ERROR "The allowed line does not compile:\n${control_output}")
endif()

execute_process(COMMAND ${command} ${SOURCE} RESULT_VARIABLE result ERROR_VARIABLE output)
# Errors quote the source (` 12 | code`) and name it; the expectation is not to be found there.
string(REPLACE "${SOURCE}" "" output "${output}")
string(REGEX REPLACE "\n *[0-9]* \\|[^\n]*" "" output "${output}")
if(result EQUAL 0)
  message(FATAL_ERROR "The forbidden line compiles")
elseif(NOT output MATCHES "${expected}")
  message(FATAL_ERROR "No error matches `${expected}`:\n${output}")
endif()
