#!/bin/sh
# Installs what compare.py measures beside moe-bench, all of it under one folder:
#
#     benches/side_by_side/setup.sh DIR
#
#   DIR/venv       PyTorch, transformers, safetensors, numpy, gguf; CMake and Ninja to build with
#   DIR/llama.cpp  llama.cpp out of the source distribution of llama-cpp-python, built for this machine's processor
#
# It needs Python 3.10 or later with venv, a C++ compiler (for AMX, GCC 11 or Clang 11 at least) and about 3 GB of disk
# with a CPU build of PyTorch. What is there already is left as it is; to start anew, remove the folder. In the
# environment:
#
#   PYTHON           the Python to make the venv of (python3)
#   TORCH_INDEX_URL  a package index to take PyTorch from. The project's own index has builds for the CPU alone. Without
#                    it, pip's ordinary index gives what it has, which on Linux brings CUDA's libraries: slower to
#                    install, no different on the CPU.
#   JOBS             compilers at a time (as many as there are cores)
set -eu

TORCH=2.15.0
TRANSFORMERS=5.17.0
SAFETENSORS=0.8.0
NUMPY=2.4.6
GGUF=0.19.0
CMAKE=4.4.4
NINJA=1.13.2
LLAMA_CPP_PYTHON=0.3.36

[ $# -eq 1 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mkdir -p "$1"
dir=$(cd "$1" && pwd)
jobs=${JOBS:-$(getconf _NPROCESSORS_ONLN)}
python=$dir/venv/bin/python

[ -x "$python" ] || "${PYTHON:-python3}" -m venv "$dir/venv"
"$python" -m pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "torch==$TORCH"
"$python" -m pip install "transformers==$TRANSFORMERS" "safetensors==$SAFETENSORS" "numpy==$NUMPY" "gguf==$GGUF" \
    "cmake==$CMAKE" "ninja==$NINJA"

source=$dir/llama.cpp
if [ ! -f "$source/CMakeLists.txt" ]; then
    # Only this one package from source: its build tools may come as wheels.
    "$python" -m pip download "llama-cpp-python==$LLAMA_CPP_PYTHON" --no-deps --no-binary llama-cpp-python \
        --dest "$dir/sdist"
    mkdir -p "$source.partial"
    tar -xzf "$dir/sdist/llama_cpp_python-$LLAMA_CPP_PYTHON.tar.gz" -C "$source.partial" --strip-components=3 \
        "llama_cpp_python-$LLAMA_CPP_PYTHON/vendor/llama.cpp"
    # GCC's _tile_loadconfig (seen with 12.2) says that it reads 8 of the configuration's 64 bytes, so that the rest is
    # optimised away and the first use of a tile is an illegal instruction. This makes it write all of them.
    mmq=$source.partial/ggml/src/ggml-cpu/amx/mmq.cpp
    barrier='__asm__ volatile("" : : "r"(\&tc) : "memory");'
    sed -i "s/^ *_tile_loadconfig(&tc);/    $barrier\n&/" "$mmq"
    grep -q '__asm__ volatile' "$mmq" || { echo "$mmq is not as expected" >&2; exit 1; }
    mv "$source.partial" "$source"
    rm -r "$dir/sdist"
fi

PATH=$dir/venv/bin:$PATH
# GGML_NATIVE compiles for all that this processor can do: AVX-512, its bf16 products and AMX where it has them.
cmake -S "$source" -B "$source/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DGGML_CCACHE=OFF \
    -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
    -DLLAMA_BUILD_APP=OFF -DLLAMA_OPENSSL=OFF
cmake --build "$source/build" --parallel "$jobs" --target llama-bench llama-batched-bench llama-quantize
echo "llama-cpp-python $LLAMA_CPP_PYTHON" > "$source/build/version"
for macro in __AVX2__ __AVX512F__ __AVX512BF16__ __AVX512VNNI__ __AMX_INT8__ __AMX_BF16__; do
    ! ${CC:-cc} -march=native -dM -E -x c /dev/null | grep -q "$macro" || echo "llama.cpp was compiled with $macro"
done
