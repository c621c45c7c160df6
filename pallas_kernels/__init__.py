"""Attention-like operations with one function per op and several implementations behind it.

    from pallas_kernels.attention import attention
    from pallas_kernels.linear_attention import linear_attention
"""
