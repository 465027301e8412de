# What the compiled helpers look like to a type checker; pages.h has the declarations.

from vmm.kvm._kvm import CData as CData
from vmm.kvm._kvm import _Ffi, _Lib

ffi: _Ffi
lib: _Lib
