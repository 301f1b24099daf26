// direct.h: small calls on the CPU without torch's dispatcher, as functions of the Python module _host.
#pragma once

#include <Python.h>

namespace normkern::bind {

// Adds the functions that normkern/direct.py calls; -1 with a Python exception set if that fails.
int add_direct(PyObject* module);

}  // namespace normkern::bind
