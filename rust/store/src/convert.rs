//! Element conversion, with a look at every value: weights must be finite before and after.

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::Dtype;

/// Elements that are converted at a time: a block of `f32` stays in the first-level cache.
const BLOCK: usize = 2048;

/// A value that may not be served, found at an index of the input.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct BadValue {
    pub(crate) index: usize,
    pub(crate) value: f32,
    /// It is finite, and too large for the output's dtype.
    pub(crate) overflow: bool,
}

/// The elements of `input`, of type `from`, as elements of `to`, rounded to nearest even: `input` itself where the two
/// are equal, else in `scratch`. Gives the greatest absolute rounding error too.
pub(crate) fn convert<'a>(
    input: &'a [u8],
    from: Dtype,
    to: Dtype,
    scratch: &'a mut Vec<u8>,
) -> Result<(&'a [u8], f32), BadValue> {
    if from == to {
        check_finite(input, from)?;
        return Ok((input, 0.0));
    }
    scratch.clear();
    let mut wide = [0.0; BLOCK];
    let mut back = [0.0; BLOCK];
    let mut max_error = 0f32;
    for (block, bytes) in input.chunks(BLOCK * from.bytes()).enumerate() {
        let shifted = |bad: BadValue| BadValue { index: block * BLOCK + bad.index, ..bad };
        check_finite(bytes, from).map_err(shifted)?;
        let wide = widen(bytes, from, &mut wide);
        let start = scratch.len();
        narrow(wide, to, scratch);
        let narrowed = &scratch[start..];
        check_finite(narrowed, to)
            .map_err(|bad| shifted(BadValue { value: wide[bad.index], overflow: true, ..bad }))?;
        if to != Dtype::F32 {
            max_error = max_error.max(max_difference(wide, widen(narrowed, to, &mut back)));
        }
    }
    Ok((scratch, max_error))
}

/// Element `index` as `f32`.
fn element(input: &[u8], dtype: Dtype, index: usize) -> f32 {
    let mut out = [0.0];
    widen(&input[index * dtype.bytes()..][..dtype.bytes()], dtype, &mut out)[0]
}

/// Finds the first element that is infinite or no number.
fn check_finite(input: &[u8], dtype: Dtype) -> Result<(), BadValue> {
    // An exponent of all ones. Blocks are searched without a branch per element, so that the loop vectorises.
    let suspicious = |bytes: &[u8]| match dtype {
        Dtype::F32 => {
            bytes.as_chunks().0.iter().fold(false, |bad, &b| bad | (u32::from_le_bytes(b) & 0x7f80_0000 == 0x7f80_0000))
        }
        Dtype::F16 => any_exponent_full(bytes, 0x7c00),
        Dtype::Bf16 => any_exponent_full(bytes, 0x7f80),
    };
    for (block, bytes) in input.chunks(BLOCK * dtype.bytes()).enumerate() {
        if suspicious(bytes) {
            let mut values = (0..bytes.len() / dtype.bytes()).map(|i| (i, element(bytes, dtype, i)));
            if let Some((i, value)) = values.find(|(_, value)| !value.is_finite()) {
                return Err(BadValue { index: block * BLOCK + i, value, overflow: false });
            }
        }
    }
    Ok(())
}

fn any_exponent_full(bytes: &[u8], exponent: u16) -> bool {
    bytes.as_chunks().0.iter().fold(false, |bad, &b| bad | (u16::from_le_bytes(b) & exponent == exponent))
}

/// Exact: every f16 and bf16 is an f32.
fn widen<'a>(input: &[u8], dtype: Dtype, output: &'a mut [f32]) -> &'a [f32] {
    let output = &mut output[..input.len() / dtype.bytes()];
    match dtype {
        Dtype::F32 => {
            for (out, &bytes) in output.iter_mut().zip(input.as_chunks().0) {
                *out = f32::from_le_bytes(bytes);
            }
        }
        Dtype::Bf16 => {
            for (out, &bytes) in output.iter_mut().zip(input.as_chunks().0) {
                *out = f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16);
            }
        }
        Dtype::F16 => {
            let mut halves = [f16::ZERO; BLOCK];
            let halves = &mut halves[..output.len()];
            for (half, &bytes) in halves.iter_mut().zip(input.as_chunks().0) {
                *half = f16::from_le_bytes(bytes);
            }
            halves.convert_to_f32_slice(output);
        }
    }
    output
}

/// Rounds to nearest, ties to even. The input is finite; the output may not be.
fn narrow(input: &[f32], dtype: Dtype, output: &mut Vec<u8>) {
    match dtype {
        Dtype::F32 => output.extend(input.iter().flat_map(|x| x.to_le_bytes())),
        Dtype::Bf16 => {
            let start = output.len();
            output.resize(start + 2 * input.len(), 0);
            for (out, &x) in output[start..].as_chunks_mut().0.iter_mut().zip(input) {
                *out = bf16_bits(x).to_le_bytes();
            }
        }
        Dtype::F16 => {
            let mut halves = [f16::ZERO; BLOCK];
            let halves = &mut halves[..input.len()];
            halves.convert_from_f32_slice(input);
            output.extend(halves.iter().flat_map(|x| x.to_le_bytes()));
        }
    }
}

fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    // Half of the last kept place, less one when that place is even: ties go to even. A finite value cannot wrap.
    let rounding = 0x7fff + (bits >> 16 & 1);
    (bits.wrapping_add(rounding) >> 16) as u16
}

fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    // Independent lanes, so that the loop vectorises.
    let mut lanes = [0f32; 16];
    let (a, a_rest) = a.as_chunks::<16>();
    let (b, b_rest) = b.as_chunks::<16>();
    for (a, b) in a.iter().zip(b) {
        for (lane, (a, b)) in lanes.iter_mut().zip(a.iter().zip(b)) {
            let difference = (a - b).abs();
            *lane = if difference > *lane { difference } else { *lane };
        }
    }
    let rest = a_rest.iter().zip(b_rest).map(|(a, b)| (a - b).abs());
    rest.chain(lanes).fold(0.0, f32::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn converted(values: &[f32], to: Dtype) -> Result<(Vec<u8>, f32), BadValue> {
        let input: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        convert(&input, Dtype::F32, to, &mut Vec::new()).map(|(output, error)| (output.to_vec(), error))
    }

    #[test]
    fn narrowing_rounds_to_nearest_even_like_the_half_crate() {
        let mut state = 1u32;
        let mut values = vec![
            0.0,
            -0.0,
            1.0,
            1.0 + 1.0 / 256.0,
            1.0 + 3.0 / 256.0,
            f32::MIN_POSITIVE,
            1e-45,
            65504.0,
            65519.9,
            -3.3e38,
        ];
        for _ in 0..20_000 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            values.push(f32::from_bits(state));
        }
        for value in values.into_iter().filter(|x| x.is_finite()) {
            let bf16 = half::bf16::from_f32(value);
            match converted(&[value], Dtype::Bf16) {
                Ok((bytes, error)) => {
                    assert_eq!(bytes, bf16.to_le_bytes());
                    assert_eq!(error, (value - bf16.to_f32()).abs());
                }
                Err(bad) => assert!(bf16.is_infinite() && bad == BadValue { index: 0, value, overflow: true }),
            }
            let f16 = f16::from_f32(value);
            match converted(&[value], Dtype::F16) {
                Ok((bytes, _)) => assert_eq!(bytes, f16.to_le_bytes()),
                Err(bad) => assert!(f16.is_infinite() && bad == BadValue { index: 0, value, overflow: true }),
            }
        }
    }

    #[test]
    fn every_16_bit_value_survives_widening() {
        for from in [Dtype::F16, Dtype::Bf16] {
            for bits in 0..=u16::MAX {
                let (bytes, mut wide, mut back) = (bits.to_le_bytes(), Vec::new(), Vec::new());
                let value = element(&bytes, from, 0);
                match convert(&bytes, from, Dtype::F32, &mut wide) {
                    Err(_) => assert!(!value.is_finite()),
                    Ok((wide, _)) => {
                        assert_eq!(wide, value.to_le_bytes());
                        assert_eq!(convert(wide, Dtype::F32, from, &mut back), Ok((&bytes[..], 0.0)));
                    }
                }
            }
        }
    }

    #[test]
    fn the_bad_value_is_found_wherever_it_is() {
        for (index, len) in [(0, 1), (2047, 2048), (2048, 2049), (5000, 9000)] {
            let mut values = vec![0.5f32; len];
            values[index] = f32::NEG_INFINITY;
            let bad = BadValue { index, value: f32::NEG_INFINITY, overflow: false };
            for to in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
                assert_eq!(converted(&values, to).err(), Some(bad));
            }
            values[index] = 1e30;
            assert_eq!(converted(&values, Dtype::F16).err(), Some(BadValue { index, value: 1e30, overflow: true }));
        }
    }
}
