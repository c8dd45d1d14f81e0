//! The text of a file as UTF-8, from UTF-8 or UTF-16, piece by piece. Start with [`Decoder`].

use std::borrow::Cow;

const UTF_8_MARK: &[u8] = &[0xef, 0xbb, 0xbf];
const UTF_16_LITTLE_MARK: &[u8] = &[0xff, 0xfe];
const UTF_16_BIG_MARK: &[u8] = &[0xfe, 0xff];

/// Converts a file to UTF-8 by its byte order mark, and removes the mark. Without one the bytes stay as they are.
#[derive(Debug)]
pub struct Decoder(Encoding);

#[derive(Debug)]
enum Encoding {
    /// Too few bytes to detect the encoding.
    Open(Vec<u8>),
    Utf8,
    Utf16 {
        is_big_endian: bool,
        /// The first byte of a unit that is split between two pieces.
        half: Option<u8>,
        /// The first unit of a pair that makes up one character.
        high: Option<u16>,
    },
}

impl Default for Decoder {
    fn default() -> Self {
        Self(Encoding::Open(Vec::new()))
    }
}

impl Decoder {
    /// The text of the next piece.
    pub fn feed<'a>(&mut self, piece: &'a [u8]) -> Cow<'a, [u8]> {
        match &mut self.0 {
            Encoding::Utf8 => Cow::Borrowed(piece),
            Encoding::Utf16 {
                is_big_endian,
                half,
                high,
            } => Cow::Owned(utf_16(piece, *is_big_endian, half, high)),
            Encoding::Open(seen) => {
                seen.extend_from_slice(piece);
                let marks = [UTF_8_MARK, UTF_16_LITTLE_MARK, UTF_16_BIG_MARK];
                let is_open = |mark: &&[u8]| mark.len() > seen.len() && mark.starts_with(seen);
                if marks.iter().any(is_open) {
                    return Cow::Borrowed(&[]);
                }
                Cow::Owned(self.decide())
            }
        }
    }

    /// The text that is left at the end of the file.
    pub fn finish(&mut self) -> Vec<u8> {
        match &self.0 {
            Encoding::Open(_) => self.decide(),
            Encoding::Utf16 {
                half: None, high: None, ..
            }
            | Encoding::Utf8 => Vec::new(),
            // The file ends within a character.
            Encoding::Utf16 { .. } => char::REPLACEMENT_CHARACTER.to_string().into_bytes(),
        }
    }

    /// Detects the encoding, and returns the text of the first bytes.
    fn decide(&mut self) -> Vec<u8> {
        let Encoding::Open(seen) = std::mem::replace(&mut self.0, Encoding::Utf8) else {
            return Vec::new();
        };
        let (is_big_endian, rest) = if let Some(rest) = seen.strip_prefix(UTF_16_LITTLE_MARK) {
            (false, rest)
        } else if let Some(rest) = seen.strip_prefix(UTF_16_BIG_MARK) {
            (true, rest)
        } else {
            return seen.strip_prefix(UTF_8_MARK).unwrap_or(&seen).to_vec();
        };
        let (mut half, mut high) = (None, None);
        let text = utf_16(rest, is_big_endian, &mut half, &mut high);
        self.0 = Encoding::Utf16 {
            is_big_endian,
            half,
            high,
        };
        text
    }
}

/// The text of a piece of UTF-16; what is not part of a character becomes the replacement character.
fn utf_16(piece: &[u8], is_big_endian: bool, half: &mut Option<u8>, high: &mut Option<u16>) -> Vec<u8> {
    let mut text = String::with_capacity(piece.len());
    for byte in piece {
        let Some(first) = half.take() else {
            *half = Some(*byte);
            continue;
        };
        let pair = [first, *byte];
        let unit = if is_big_endian {
            u16::from_be_bytes(pair)
        } else {
            u16::from_le_bytes(pair)
        };
        let is_second = (0xdc00..0xe000).contains(&unit);
        if let Some(before) = high.take() {
            if is_second {
                text.extend(char::decode_utf16([before, unit]).map(|read| read.unwrap_or(char::REPLACEMENT_CHARACTER)));
                continue;
            }
            text.push(char::REPLACEMENT_CHARACTER);
        }
        if (0xd800..0xdc00).contains(&unit) {
            *high = Some(unit);
        } else {
            text.push(char::from_u32(unit.into()).unwrap_or(char::REPLACEMENT_CHARACTER));
        }
    }
    text.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8], piece_len: usize) -> String {
        let mut decoder = Decoder::default();
        let mut text = Vec::new();
        for piece in bytes.chunks(piece_len) {
            text.extend_from_slice(&decoder.feed(piece));
        }
        text.extend(decoder.finish());
        String::from_utf8_lossy(&text).into_owned()
    }

    #[test]
    fn text_is_the_same_in_every_encoding_and_in_pieces_of_every_length() {
        let text = "id,\u{e9}\u{1f4a5}\n";
        let marked = format!("\u{feff}{text}");
        let units = || marked.encode_utf16();
        for bytes in [
            text.as_bytes().to_vec(),
            marked.as_bytes().to_vec(),
            units().flat_map(u16::to_le_bytes).collect(),
            units().flat_map(u16::to_be_bytes).collect(),
        ] {
            for len in 1..=bytes.len() {
                assert_eq!(read(&bytes, len), text, "{bytes:?} in pieces of {len}");
            }
        }
    }

    #[test]
    fn broken_utf_16_is_marked_and_nothing_behind_it_is_lost() {
        for (bytes, text) in [
            (&[0xff, 0xfe, 0x3d, 0xd8, b'a', 0][..], "\u{fffd}a"),
            (&[0xff, 0xfe, 0xa5, 0xdc, b'a', 0], "\u{fffd}a"),
            (&[0xff, 0xfe, b'a', 0, b'b'], "a\u{fffd}"),
            (&[0xff, 0xfe, b'a', 0, 0x3d, 0xd8], "a\u{fffd}"),
            (&[0xff], "\u{fffd}"),
            (&[], ""),
        ] {
            assert_eq!(read(bytes, 1), text, "{bytes:?}");
        }
    }
}
