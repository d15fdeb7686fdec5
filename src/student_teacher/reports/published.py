"""What others published for MVTec AD's categories, to stand beside ours."""

SOURCES = {
    "Paper": "Paul Bergmann, Michael Fauser, David Sattlegger, Carsten Steger: Uninformed Students: Student-Teacher "
    "Anomaly Detection with Discriminative Latent Embeddings. CVPR 2020",
    "EfficientAD": "Kilian Batzner, Lars Heckler, Rebecca König: EfficientAD: Accurate Visual Anomaly Detection at "
    "Millisecond-Level Latencies. WACV 2024; measured by its public reproduction github.com/nelson1425/EfficientAD, "
    "results/mvtec_ad_small.json (as of commit ce0275c) and results/mvtec_ad_medium.json",
}
# Each published column, and the measure of ours that is its like. AU-PRO is up to a false positive rate of 0.3.
BESIDE = {
    "paper_p65": "au_pro",
    "paper_multiscale": "au_pro",
    "efficientad_s_au_pro": "au_pro",
    "efficientad_m_au_pro": "au_pro",
    "efficientad_s_image_au_roc": "image_au_roc",
    "efficientad_m_image_au_roc": "image_au_roc",
}
# In MVTec's order of categories; figures in the order of BESIDE.
FIGURES = {
    "carpet": (0.695, 0.879, 0.918, 0.930, 0.994, 0.994),
    "grid": (0.819, 0.952, 0.893, 0.892, 0.998, 1.000),
    "leather": (0.819, 0.945, 0.982, 0.982, 1.000, 1.000),
    "tile": (0.912, 0.946, 0.882, 0.884, 0.998, 1.000),
    "wood": (0.725, 0.911, 0.904, 0.905, 0.997, 0.996),
    "bottle": (0.918, 0.931, 0.952, 0.957, 0.999, 1.000),
    "cable": (0.865, 0.818, 0.882, 0.904, 0.935, 0.942),
    "capsule": (0.916, 0.968, 0.976, 0.971, 0.984, 0.981),
    "hazelnut": (0.937, 0.965, 0.948, 0.952, 0.994, 0.998),
    "metal_nut": (0.895, 0.942, 0.936, 0.948, 0.995, 0.996),
    "pill": (0.935, 0.961, 0.970, 0.964, 0.985, 0.991),
    "screw": (0.928, 0.942, 0.956, 0.973, 0.979, 0.974),
    "toothbrush": (0.863, 0.933, 0.946, 0.945, 1.000, 1.000),
    "transistor": (0.701, 0.666, 0.903, 0.914, 0.999, 0.999),
    "zipper": (0.933, 0.951, 0.944, 0.941, 0.996, 0.994),
}


def figures_of(category: str) -> dict[str, float | None]:
    """A category's published figures, for each column of BESIDE; None where there is none."""
    return dict(zip(BESIDE, FIGURES.get(category, [None] * len(BESIDE)), strict=True))
