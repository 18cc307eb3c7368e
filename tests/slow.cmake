# What is left to `./check --all` (label slow), and why.
#
# regroup_slow(test pattern...): of this program, or of it on N ranks (name.rN), the tests that a pattern of gtest's fits.
# regroup_slow(test EXCEPT pattern...): all of its tests but those.
function(regroup_slow test)
  list(JOIN ARGN ":" patterns)
  set(regroup_slow_${test} "${patterns}" PARENT_SCOPE)
endfunction()

# The gtest filters of the usual and the slow tests, by the first name that regroup_slow() was given; empty for none.
function(regroup_slow_filters usual slow)
  set(patterns "")
  foreach(test IN LISTS ARGN)
    if(NOT patterns)
      set(patterns "${regroup_slow_${test}}")
    endif()
  endforeach()
  set(${usual} "*" PARENT_SCOPE)
  set(${slow} "" PARENT_SCOPE)
  if(patterns STREQUAL "*")
    set(${usual} "" PARENT_SCOPE)
    set(${slow} "*" PARENT_SCOPE)
  elseif(patterns MATCHES "^EXCEPT:(.*)")
    set(${usual} "${CMAKE_MATCH_1}" PARENT_SCOPE)
    set(${slow} "-${CMAKE_MATCH_1}" PARENT_SCOPE)
  elseif(patterns)
    set(${usual} "-${patterns}" PARENT_SCOPE)
    set(${slow} "${patterns}" PARENT_SCOPE)
  endif()
endfunction()

# Central differences call an op for every element. On processors they hold the definition of each op; here
# AgreesWithTheReference and AgreesWithTheDefinition compare the emulated GPU's backward ops with that.
regroup_slow(ops_test_emulated "*GradientTest*")

# Who owns what on more ranks is the same on every device, and layout_test looks at it on processors: the one model with
# fewer groups than ranks at some attentions, and more at others, stands for the rest.
regroup_slow(layout_test_emulated.r4 EXCEPT "*uneven*")

if(REGROUP_SANITIZE)
  # The same code once more, on other threads.
  regroup_slow(ops_test "*SameBits*")
  regroup_slow(layout_test "*SameBits*")
endif()
