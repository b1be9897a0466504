"""Compile the Triton kernels for GPUs that aren't there: `python tests/drills/compile_kernels.py [--all]`

Without --all one configuration for compute capability 8.0, which pytest runs too; with it every entry of the table, for
8.0 and 9.0 (about two minutes). Prints shared memory, registers and spilled bytes a thread. TRITON_INTERPRET must not
be set."""
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kat.compute import triton_kernels as page


def kind(name, fixed, dtype):
    "Triton's type of a kernel's parameter"
    if name in fixed: return 'constexpr'
    if name in ('LSE', 'DELTA'): return '*fp32'
    if name in ('END', 'POSITION', 'START', 'SPLIT', 'INDEX'): return '*i32'
    if name.isupper(): return '*bf16' if dtype == torch.bfloat16 else '*fp32'
    return 'fp32' if name in ('scale', 'scaling') else 'i32'


def compiled(fn, capability, D, dtype, padded, config):
    rows, columns, warps, stages = config
    fixed = dict(G=3, D=D, BLOCK_D=padded, BLOCK_M=rows, BLOCK_N=columns, WINDOWED=True, PRECISION='ieee')
    names = [p.name for p in fn.params]
    aligned = {(i,): [['tt.divisibility', 16]] for i, name in enumerate(names)
               if name not in fixed and (name.isupper() or name.startswith('stride_'))}  # as in a real call
    source = ASTSource(fn=fn, signature={name: kind(name, fixed, dtype) for name in names}, attrs=aligned,
                       constexprs={(names.index(name),): value for name, value in fixed.items()})
    options = dict(num_warps=warps, num_stages=stages)
    return triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options)


def usage(kernel):
    "registers, and bytes of stack: what was spilled"
    tool = Path(triton.__file__).parent/'backends'/'nvidia'/'bin'/'cuobjdump'
    with tempfile.NamedTemporaryFile(suffix='.cubin') as f:
        Path(f.name).write_bytes(kernel.asm['cubin'])
        text = subprocess.run([tool, '-res-usage', f.name], capture_output=True, text=True, check=True).stdout
    return [int(re.search(rf'{x}:(\d+)', text)[1]) for x in ('REG', 'STACK')]


def show(capability, D, dtype):
    "Compile the three kernels for one head size and dtype, and print what each takes."
    padded, forward, backward = page._config(D, dtype)
    for name, config in dict(_forward_kernel=forward, _query_kernel=backward, _key_kernel=backward).items():
        kernel = compiled(getattr(page, name), capability, D, dtype, padded, config)
        shared, (registers, spilled) = kernel.metadata.shared, usage(kernel)
        print(f'{capability/10} {str(dtype)[6:]:9}{D:4} {name:16}{str(config):17} {shared/1024:5.0f} KB shared '
              f'{registers:4} registers {spilled:3} B spilled', 'tensor cores' if 'mma' in kernel.asm['ptx'] else '',
              flush=True)
        if shared > 99*1024: raise SystemExit('too much shared memory')


def main(everything):
    page.load_kernels()
    if not everything: return show(80, 64, torch.bfloat16)
    for capability, D, dtype in product((80, 90), (16, 64, 96, 128, 256), (torch.bfloat16, torch.float32)):
        show(capability, D, dtype)


if __name__ == '__main__':
    main('--all' in sys.argv[1:])
