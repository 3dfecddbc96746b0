# Every weak symbol that the kernels of an instruction set define must carry its namespace: the
# linker keeps one copy of each weak symbol for the whole program, and a std:: template compiled for
# AVX-512 would be called on processors without it.
set(count 0)
foreach(object ${OBJECTS})
  string(REGEX MATCH "lora_ortho_kernels_([a-z0-9_]+)\\.dir" _ "${object}")
  set(isa ${CMAKE_MATCH_1})
  string(LENGTH "${isa}" length)
  execute_process(COMMAND ${NM} --defined-only ${object} OUTPUT_VARIABLE symbols
                  RESULT_VARIABLE status)
  if(NOT status EQUAL 0 OR isa STREQUAL "")
    message(FATAL_ERROR "cannot read ${object}")
  endif()
  string(REPLACE "\n" ";" symbols "${symbols}")
  foreach(symbol ${symbols})
    if(symbol MATCHES " [WVu] (.*)$")
      set(name ${CMAKE_MATCH_1})
      if(NOT name MATCHES "^_Z[A-Z]*N[A-Z]*10lora_ortho3cpu${length}${isa}" AND
         NOT name STREQUAL "DW.ref.__gxx_personality_v0")
        message(SEND_ERROR "${isa}: weak symbol outside lora_ortho::cpu::${isa}: ${name}")
      endif()
    endif()
  endforeach()
  math(EXPR count "${count} + 1")
endforeach()
message(STATUS "${count} kernel objects read")
if(count EQUAL 0)
  message(FATAL_ERROR "no kernel objects were given")
endif()
