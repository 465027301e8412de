# What the compiled module looks like to a type checker; mapped.h has the declarations.

from vmm.kvm._kvm import _Ffi, _Lib

ffi: _Ffi
lib: _Lib
