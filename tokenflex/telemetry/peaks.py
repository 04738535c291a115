"""What devices can do at most: dense FLOPs per second of matrix products in bf16, by the makers' data sheets."""

PEAK_BF16 = {
    "A10G": 70e12,
    "A10": 125e12,
    "A100": 312e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "B200": 2250e12,
    "B300": 2250e12,
    "GB200": 2450e12,
    "GH200": 989.4e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "H200": 989.4e12,
    "H20": 148e12,
    "H800": 989.4e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "MI250X": 383e12,
    "MI300X": 1307.4e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "RTX A6000": 154.8e12,
}
"""Part of a device's name -> FLOPs per second, without sparsity; the longest name that is found counts."""


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense FLOPs per second of a device (`torch.cuda.get_device_name`) in `bf16`; None where it is not known.

    Other precisions are not in the table: what fp32 may use (TF32 or not) is the user's setting, not the device's.
    """
    if precision != "bf16":
        return None
    words = f" {device_name.replace('-', ' ')} "
    found = [name for name in PEAK_BF16 if f" {name} " in words]
    return PEAK_BF16[max(found, key=len)] if found else None
