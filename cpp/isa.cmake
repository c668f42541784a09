# The only list of ISA levels, best last: name, architecture, compiler flags, and the CPU features those flags allow the compiler
# to use (each is checked at run time before the level is chosen). A level is kernels/isa_<name>.cpp.
#
# No -march=<cpu>: it would enable features nobody checks. With -ffp-contract=off, fma is used where vec.h says so and nowhere else.
batchnorm_isa(baseline ANY FLAGS -O2 FEATURES)
batchnorm_isa(avx2 x86_64 FLAGS -O2 -mavx2 -mf16c -mfma FEATURES avx2 f16c fma)
batchnorm_isa(avx512 x86_64 FLAGS -mavx512f -mavx512bw -mavx512dq -mavx512vl -mf16c -mprefer-vector-width=512
              FEATURES avx2 f16c avx512f avx512bw avx512dq avx512vl)
