"""From a photo's bytes to a small JPEG: what is converted, what is refused, and how good it looks."""

import io
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from photos import bomb, jpeg, picture
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from preprocessing.city.plan import CitySettings, Plan
from preprocessing.city.streetview import Renderer
from preprocessing.resize import BadPhoto, Resizer

RESIZER = Resizer(size=64, quality=95)
KINDS = Path(__file__).parent / "golden" / "jpeg"
"""`picture(64, 7)` as JPEGs that neither Pillow nor simplejpeg writes: by cjpeg -arithmetic [-progressive], -sample 4x2
and -rgb, and by imagecodecs' jpeg8_encode (lossless; 12 bits)."""


def saved(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def small(data: bytes, resizer: Resizer = RESIZER) -> np.ndarray:
    return simplejpeg.decode_jpeg(resizer(data)).astype(float)


def expected(photo: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(photo).resize((64, 64), Image.Resampling.LANCZOS)).astype(float)


@pytest.mark.parametrize("resize_filter", ["fast", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [64, 96, 128, 150, 512])
def test_any_filter_and_size_gives_the_same_picture(resize_filter, size):
    photo = picture(size, 1)
    data = saved(Image.fromarray(photo), format="JPEG", quality=97)
    assert np.abs(small(data, Resizer(64, 95, resize_filter)) - expected(photo)).mean() < 3


@pytest.fixture(scope="module")
def street_photos() -> list[bytes]:
    """Six rendered photos of 512 pixels, as JPEGs of some 50 kB."""
    plan = Plan(CitySettings(blocks=1, years=1, val_queries=0, test_queries=6))
    renderer = Renderer(plan)
    queries = [pano for pano in plan.panoramas if pano.split == "test"]
    pixels = [renderer.photo(renderer.look_around(query), 0) for query in queries]
    return [simplejpeg.encode_jpeg(photo, plan.settings.quality) for photo in pixels]


@pytest.mark.parametrize("quality", [75, 90, 95])
@pytest.mark.parametrize("size", [160, 224, 256])
def test_what_the_fast_way_tells_decoders_brings_photos_nearer_to_a_lanczos_reduction(street_photos, size, quality):
    fast = Resizer(size, quality)
    gains = []
    for photo in street_photos:
        pixels = Image.open(io.BytesIO(photo))
        exact = np.asarray(pixels.resize((size, size), Image.Resampling.LANCZOS)).astype(float)
        ours = fast(photo)
        plain = simplejpeg.encode_jpeg(fast.resize(fast.decode(photo)), quality, "RGBX", "420", fastdct=True)
        our_error, plain_error = (np.square(simplejpeg.decode_jpeg(small) - exact).mean() for small in (ours, plain))
        gains.append(plain_error / our_error)
        our_tables, plain_tables = (JpegImageFile(io.BytesIO(small)).quantization for small in (ours, plain))
        assert our_tables[0] != plain_tables[0]
        assert our_tables[1] == plain_tables[1]
        assert ours[ours.index(b"\xff\xda") :] == plain[plain.index(b"\xff\xda") :]
    assert min(gains) > 1
    assert np.mean(gains) > 1.005


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_photos_of_the_size_asked_for_are_encoded_as_they_are(form):
    data = saved(Image.fromarray(picture(64, 3)), format=form)
    resizer = Resizer(64, 90)
    assert resizer(data) == simplejpeg.encode_jpeg(
        resizer.decode(data)[:, :, :3].copy(), 90, "RGB", "420", fastdct=True
    )
    smaller = resizer.decode(saved(Image.fromarray(picture(48, 3)), format=form))
    assert resizer.shrink(smaller, data) == resizer.encode(resizer.resize(smaller), reduced=False)
    whole = saved(Image.fromarray(picture(128, 3)), format=form)
    assert (
        JpegImageFile(io.BytesIO(resizer(whole))).quantization != JpegImageFile(io.BytesIO(resizer(data))).quantization
    )


def test_a_png_called_jpg_is_read_for_what_it_is():
    photo = picture(128, 2)
    assert np.abs(small(saved(Image.fromarray(photo), format="PNG")) - expected(photo)).mean() < 3


def test_greyscale_cmyk_and_palette_photos_are_converted():
    photo = picture(128, 3)
    grey = Image.fromarray(photo).convert("L")
    for data in (
        saved(grey, format="JPEG", quality=97),
        saved(grey, format="PNG"),
        saved(Image.fromarray(np.asarray(grey).astype(np.uint16) << 8), format="PNG"),
    ):
        result = small(data)
        assert np.ptp(result, axis=2).max() <= 4
        assert np.abs(result.mean(2) - expected(np.asarray(grey))).mean() < 3
    cmyk = saved(Image.fromarray(photo).convert("CMYK"), format="JPEG", quality=97)
    assert np.abs(small(cmyk) - expected(photo)).mean() < 4


def test_odd_metadata_is_passed_over_in_silence(recwarn):
    odd = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\x00\x03\0\0\0\2\0\6\0\6" + bytes(8)
    Resizer(64, 90)(saved(Image.fromarray(picture(96, 1)), format="JPEG", exif=odd))
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["arithmetic", "arithmetic-progressive", "chroma-4x2", "lossless", "rgb"])
def test_uncommon_kinds_of_jpeg_give_the_same_picture(kind):
    data = (KINDS / f"{kind}.jpg").read_bytes()
    resizer = Resizer(32, 95)
    made = resizer.resize(resizer.decode(data))[:, :, :3].astype(float)
    assert np.abs(made - np.asarray(Image.fromarray(picture(64, 7)).resize((32, 32)))).mean() < 8
    with pytest.raises(BadPhoto, match="truncated"):
        resizer(data[:-400])


def test_a_jpeg_of_12_bits_is_refused_and_the_reason_says_so():
    with pytest.raises(BadPhoto, match=r"unreadable: .*precision 12"):
        Resizer(16, 95)((KINDS / "12-bits.jpg").read_bytes())


def test_of_several_pictures_in_a_file_the_first_is_taken():
    photo, other = (Image.fromarray(picture(128, seed)) for seed in (1, 2))
    plain = saved(photo, format="JPEG", quality=97)

    def both(**options) -> bytes:
        return saved(photo.copy(), save_all=True, append_images=[other.copy()], **options)

    for data in (
        both(format="MPO", quality=97),  # as phones write it
        plain + saved(other, format="JPEG"),
        plain + b"\0\0\0\x18ftypmp42" + jpeg(64, 3)[300:],  # with a film behind it
        both(format="PNG"),
        both(format="WEBP", lossless=True),
        both(format="TIFF"),
    ):
        assert np.abs(small(data) - expected(np.asarray(photo))).mean() < 3


def test_a_palette_with_transparency_is_converted():
    photo = Image.fromarray(picture(128, 3)).quantize(256)
    data = saved(photo, format="PNG", transparency=5)
    assert np.abs(small(data) - expected(np.asarray(photo.convert("RGB")))).mean() < 6


def test_grey_of_32_bits_is_refused_and_not_made_black_or_white():
    with pytest.raises(BadPhoto, match="pixels of 32 bits"):
        RESIZER(saved(Image.fromarray(np.full((128, 128), 0.5, np.float32)), format="TIFF"))


@pytest.mark.parametrize("size", [(1, 512), (512, 1), (31, 9000)])
def test_a_sliver_of_a_photo_is_too_small(size):
    with pytest.raises(BadPhoto, match="too small"):
        RESIZER(saved(Image.new("RGB", size), format="JPEG"))


def test_a_very_tall_photo_is_stretched_to_the_square():
    photo = Image.fromarray(picture(64, 4))
    data = saved(photo.resize((64, 20_000), Image.Resampling.BICUBIC), format="JPEG", quality=97)
    assert np.abs(small(data) - expected(np.asarray(photo))).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_upright_as_exif_says(orientation):
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    photo = picture(128, 4)
    tags = Image.Exif()
    tags[0x0112] = orientation
    stored = np.ascontiguousarray(undo[orientation](photo))
    for kind in ("JPEG", "PNG"):
        data = saved(Image.fromarray(stored), format=kind, exif=tags, quality=97)
        assert np.abs(small(data) - expected(photo)).mean() < 3


def test_an_orientation_is_found_behind_a_colour_profile_in_xmp_and_in_a_tiff():
    photo = picture(128, 4)
    stored = Image.fromarray(np.rot90(photo, 1).copy())
    tags = Image.Exif()
    tags[0x0112] = 6
    turned, plain = (saved(stored, format="JPEG", quality=97, **o) for o in ({"exif": tags}, {}))
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    for data in (
        turned[:2] + b"\xff\xe2" + (6002).to_bytes(2, "big") + bytes(6000) + turned[2:],
        plain[:2] + b"\xff\xe1" + (2 + len(xmp)).to_bytes(2, "big") + xmp + plain[2:],
        saved(stored, format="TIFF", exif=tags),
    ):
        assert np.abs(small(data) - expected(photo)).mean() < 3


@pytest.mark.parametrize("orientation", [0, 9, 255, 65535])
def test_an_orientation_that_is_none_is_taken_as_upright(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    data = saved(Image.fromarray(picture(128, 4)), format="JPEG", exif=tags, quality=97)
    assert np.abs(small(data) - expected(picture(128, 4))).mean() < 3


def test_progressive_photos_come_out_as_baseline():
    data = RESIZER(saved(Image.fromarray(picture(128, 5)), format="JPEG", progressive=True))
    assert b"\xff\xc2" not in data


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"hello", "not an image"),
        (b"\xff\xd8\xff" + b"\0" * 500 + b"\xff\xd9", "unreadable"),
        (jpeg(512, 1)[:9000], "truncated"),
        (jpeg(512, 1)[:-2], "truncated"),
        (jpeg(512, 1)[:300], "truncated"),
        (jpeg(512, 1)[:9000] + bytes(5000), "truncated"),
        (saved(Image.fromarray(picture(128, 1)), format="PNG")[:-3000], "truncated"),
        (jpeg(20, 1), "too small"),
    ],
)
def test_a_bad_photo_is_refused_with_its_reason(data, reason):
    with pytest.raises(BadPhoto) as refused:
        RESIZER(data)
    assert refused.value.reason == reason


def test_a_png_with_a_changed_byte_is_refused_by_its_checksum():
    data = saved(Image.fromarray(picture(128, 1)), format="PNG")
    pixels = data.index(b"IDAT") + 4
    reasons = set()
    for at in (
        20,
        *np.random.default_rng(0).integers(pixels, len(data) - 16, 100),
        *range(len(data) - 40, len(data) - 12),
    ):
        damaged = bytearray(data)
        damaged[at] ^= 1
        with pytest.raises(BadPhoto) as refused:
            RESIZER(bytes(damaged))
        reasons.add(refused.value.reason)
    assert reasons == {"CRC mismatch"}


def test_what_follows_the_end_of_a_png_is_no_part_of_it():
    data = saved(Image.fromarray(picture(128, 1)), format="PNG")
    for behind in (bytes(4096), b"\0\0\0\4IDATnone\0\0\0\0"):
        assert RESIZER(data + behind) == RESIZER(data)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_photo_cut_off_anywhere_is_truncated(progressive):
    data = saved(Image.fromarray(picture(256, 9)), format="JPEG", quality=97, progressive=progressive)
    for end in np.random.default_rng(0).integers(4, len(data) - 1, 50):
        with pytest.raises(BadPhoto, match="truncated"):
            RESIZER(data[:end])


def test_a_cmyk_photo_with_a_hole_is_refused():
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 4), np.uint8)
    data = bytearray(saved(Image.fromarray(noise, "CMYK"), format="JPEG", quality=97))
    data[20_000:24_000] = bytes(4000)
    with pytest.raises(BadPhoto, match="unreadable"):
        RESIZER(bytes(data))


def test_lost_and_wrong_restart_markers_are_refused():
    data = bytearray(saved(Image.fromarray(picture(256, 9)), format="JPEG", quality=97, restart_marker_blocks=4))
    at = [i for i in range(700, len(data) - 1) if data[i] == 0xFF and 0xD0 <= data[i + 1] <= 0xD7]
    assert len(at) > 20
    RESIZER(bytes(data))
    lost = data[: at[5]] + data[at[9] :]
    wrong = bytearray(data)
    wrong[at[5] + 1] = 0xD0 + (wrong[at[5] + 1] - 0xD0 + 3) % 8
    for damaged in (lost, wrong):
        with pytest.raises(BadPhoto, match="unreadable"):
            RESIZER(bytes(damaged))


def test_a_picture_of_a_thousand_megapixels_is_refused_before_it_is_decoded():
    header = bytearray(jpeg(64, 1))
    frame = header.index(b"\xff\xc0")
    header[frame + 5 : frame + 9] = (30000).to_bytes(2, "big") * 2
    for data in (bytes(header), bomb(30000, 30000)):
        with pytest.raises(BadPhoto, match="too large"):
            RESIZER(data)


@pytest.mark.parametrize("kind", ["progressive", "a component a scan"])
def test_a_jpeg_of_very_many_scans_is_refused_before_it_is_decoded(kind):
    data = bytearray(saved(Image.fromarray(picture(128, 1)), format="JPEG", progressive=kind == "progressive"))
    scan = data.rindex(b"\xff\xda")
    if kind != "progressive":
        data[scan : scan + 14] = b"\xff\xda\0\x08\1\1\0\0\x3f\0"
    with pytest.raises(BadPhoto, match="more than 64 scans"):
        RESIZER(bytes(data[:scan] + data[scan:-2] * 100 + data[-2:]))


@pytest.mark.parametrize("marker", [0x01, 0x02, 0xBF])
def test_scans_do_not_hide_behind_a_marker_that_has_no_length(marker):
    data = saved(Image.fromarray(picture(128, 1)), format="JPEG", progressive=True)
    scans = bytes([0xFF, marker]) + data[data.rindex(b"\xff\xda") : -2] * 100
    with pytest.raises(BadPhoto, match="more than 64 scans"):
        RESIZER(data[:-2] + scans + data[-2:])


def test_further_scans_after_a_whole_one_are_refused():
    data = jpeg(128, 1)
    with pytest.raises(BadPhoto, match="unreadable"):
        RESIZER(data[:-2] + data[data.index(b"\xff\xda") :])


def test_scans_are_not_counted_in_thumbnails_comments_and_second_pictures():
    plain = jpeg(128, 1)
    progressive = saved(Image.fromarray(picture(128, 1)), format="JPEG", progressive=True)
    comment = b"\xff\xfe" + (2 + 200).to_bytes(2, "big") + b"\xff\xda" * 100
    for photo in (plain, progressive):
        for data in (photo[:2] + comment + photo[2:], photo + comment):
            assert RESIZER(data) == RESIZER(photo)


def test_flipped_bytes_never_crash_and_never_pass_as_another_size():
    rng = np.random.default_rng(0)
    good = jpeg(128, 1)
    reasons = set()
    for _ in range(300):
        data = bytearray(good)
        for position in rng.integers(0, len(data), 3):
            data[position] = rng.integers(0, 256)
        try:
            made = RESIZER(bytes(data))
        except BadPhoto as bad:
            reasons.add(bad.reason)
        else:
            assert simplejpeg.decode_jpeg_header(made)[:2] == (64, 64)
    assert reasons <= {"unreadable", "truncated", "not an image", "too large", "too small"}
    assert reasons
