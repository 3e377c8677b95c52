# Configures the project with one choice after the other and looks for the sentence.
set(old ${FOLDER}/nvcc)
file(REMOVE_RECURSE ${FOLDER})
file(WRITE ${old} "#!/bin/sh\necho 'Cuda compilation tools, release 12.9, V12.9.86'\n")
file(CHMOD ${old} PERMISSIONS OWNER_READ OWNER_WRITE OWNER_EXECUTE)

# expect(choice nvcc result sentence): result is 0 or 1, as of cmake.
function(expect choice nvcc result sentence)
  execute_process(
    COMMAND ${CMAKE_COMMAND} -G ${GENERATOR} -S ${SOURCE} -B ${FOLDER}/build -DCMAKE_CXX_COMPILER=${CXX} -DTILEWISE_HIGHWAY_INCLUDE=${HIGHWAY}
            -DTILEWISE_BUILD_TOOL=OFF -DTILEWISE_BUILD_TESTS=OFF -DTILEWISE_BUILD_EXAMPLES=OFF -DTILEWISE_CUDA=${choice}
            -DCUDAToolkit_NVCC_EXECUTABLE=${nvcc}
    RESULT_VARIABLE code OUTPUT_VARIABLE text ERROR_VARIABLE text)
  string(REGEX REPLACE "[ \n]+" " " words "${text}") # cmake breaks the lines of errors
  string(FIND "${words}" "${sentence}" at)
  if(NOT code EQUAL ${result} OR at EQUAL -1)
    message(SEND_ERROR "TILEWISE_CUDA=${choice} with nvcc ${nvcc} ended with ${code}, expected ${result} and '${sentence}':\n${text}")
  endif()
endfunction()

set(too_old "the version of ${old} is 12.9.86, and the kernels need 13.0 or newer")
expect(maybe "${old}" 1 "TILEWISE_CUDA is maybe, which is none of AUTO, ON and OFF")
expect(OFF "${old}" 0 "-- Tilewise without GPU kernels: TILEWISE_CUDA is OFF")
expect(no "${old}" 0 "-- Tilewise without GPU kernels: TILEWISE_CUDA is OFF")
expect(AUTO "${old}" 0 "-- Tilewise without GPU kernels: ${too_old}")
expect(ON "${old}" 1 "TILEWISE_CUDA is ON, but ${too_old}")
if(NVCC)
  expect(AUTO "${NVCC}" 0 "-- Tilewise with GPU kernels: ${NVCC}, version ")
  expect(true "${NVCC}" 0 "-- Tilewise with GPU kernels: ${NVCC}, version ")
endif()
