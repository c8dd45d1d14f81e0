//! Lines of a device import, cut out of a stream of bytes as they arrive. Start with [`DeviceLines`].
//!
//! Files may be UTF-8, or UTF-16 with a byte order mark. Fields are separated by commas, semicolons or tabs: the header
//! shows it, or a first line `sep=;`. Line ends may be those of any system, and column names may have any letter case.
//!
//! A line takes at most [`RECORD_BYTES_MAX`] of memory. So an unclosed quote is one bad line, and does not fill the
//! memory.

use std::{borrow::Cow, ops::Range};

use csv_core::{ReadRecordResult, Reader, ReaderBuilder};
use data_encoding::HEXLOWER_PERMISSIVE;
use seawall_proto::{
    hello::IdentityNames,
    id::{DeviceId, InvalidLabel, Label, SecretHash},
};

use super::{csv_text::Decoder, devices::not_a_device};
use crate::store::{ImportLine, ImportRow};

/// Maximum length of a line, in bytes: ten times the longest values. A longer one is a bad line.
const RECORD_BYTES_MAX: usize = 4_096;
/// Maximum number of fields of a line.
const FIELDS_MAX: usize = 16;
/// Separators of fields, the default first.
const SEPARATORS: [u8; 3] = [b',', b';', b'\t'];
/// Prefix of a first line that names the separator, as spreadsheets write it.
const SEPARATOR_LINE: &[u8] = b"sep=";
/// Lengths of a device's secret, in bytes (docs/OPERATIONS.md, importing devices).
const SECRET_LEN: std::ops::RangeInclusive<usize> = 16..=128;

/// Reads the file piece by piece.
pub struct DeviceLines {
    names: IdentityNames,
    decoder: Decoder,
    /// The beginning of the file, until the separator is known. At most [`RECORD_BYTES_MAX`] and one piece.
    beginning: Option<Vec<u8>>,
    separator: u8,
    reader: Reader,
    record: Box<[u8; RECORD_BYTES_MAX]>,
    record_len: usize,
    ends: [usize; FIELDS_MAX],
    ends_len: usize,
    /// The record is longer than [`RECORD_BYTES_MAX`].
    is_too_long: bool,
    /// Line ends so far: LF, CR, or CR and LF together.
    lines_ended: u64,
    /// The last byte was a CR: a LF behind it ends the same line.
    is_after_cr: bool,
    columns: Option<Columns>,
}

/// Where each column is.
#[derive(Debug, Default, PartialEq, Eq)]
struct Columns {
    count: usize,
    id: usize,
    secret: Option<usize>,
    secret_sha256: Option<usize>,
    tenant: Option<usize>,
    model: Option<usize>,
}

/// The header is not that of a device import.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {number}, the header: {problem}")]
pub struct BadHeader {
    number: u64,
    problem: String,
}

impl DeviceLines {
    /// `names` maps ids to devices.
    pub fn new(names: IdentityNames) -> Self {
        Self {
            names,
            decoder: Decoder::default(),
            beginning: Some(Vec::new()),
            separator: SEPARATORS[0],
            reader: Reader::new(),
            record: Box::new([0; RECORD_BYTES_MAX]),
            record_len: 0,
            ends: [0; FIELDS_MAX],
            ends_len: 0,
            is_too_long: false,
            lines_ended: 0,
            is_after_cr: false,
            columns: None,
        }
    }

    /// Takes the next piece of the file and appends the lines that it completes.
    ///
    /// # Errors
    /// The header is wrong.
    pub fn feed(&mut self, piece: &[u8], lines: &mut Vec<ImportLine>) -> Result<(), BadHeader> {
        let text = self.decoder.feed(piece);
        self.take_text(text, lines)
    }

    fn take_text(&mut self, text: Cow<'_, [u8]>, lines: &mut Vec<ImportLine>) -> Result<(), BadHeader> {
        let text = match &mut self.beginning {
            None => text,
            Some(beginning) => {
                beginning.extend_from_slice(&text);
                if beginning.len() < RECORD_BYTES_MAX && !shows_separator(beginning) {
                    return Ok(());
                }
                Cow::Owned(self.begin())
            }
        };
        let mut rest = &text[..];
        while !rest.is_empty() {
            rest = self.step(rest, lines)?;
        }
        Ok(())
    }

    /// Detects the separator, and returns the text to read.
    fn begin(&mut self) -> Vec<u8> {
        let mut text = self.beginning.take().unwrap_or_default();
        let first = first_line(&text);
        let named = first
            .get(..SEPARATOR_LINE.len())
            .filter(|start| start.eq_ignore_ascii_case(SEPARATOR_LINE))
            .and_then(|_| first.get(SEPARATOR_LINE.len()).copied())
            .filter(|separator| separator.is_ascii_punctuation() || *separator == b'\t');
        if let Some(separator) = named {
            self.separator = separator;
            let line_len = first.len();
            let end_len = match text.get(line_len..) {
                Some([b'\r', b'\n', ..]) => 2,
                Some([_, ..]) => 1,
                Some([]) | None => 0,
            };
            self.is_after_cr = end_len == 1 && text.get(line_len) == Some(&b'\r');
            text.drain(..line_len + end_len);
            self.lines_ended = 1;
        } else {
            let header = text.trim_ascii_start();
            let found = first_line(header).iter().find(|byte| SEPARATORS.contains(byte));
            self.separator = found.copied().unwrap_or(SEPARATORS[0]);
        }
        self.reader = ReaderBuilder::new().delimiter(self.separator).build();
        text
    }

    /// Ends the file: appends the last line if it had no line end.
    ///
    /// # Errors
    /// There was no header, or a wrong one.
    pub fn finish(mut self, lines: &mut Vec<ImportLine>) -> Result<(), BadHeader> {
        let text = self.decoder.finish();
        self.take_text(Cow::Owned(text), lines)?;
        if self.beginning.is_some() {
            let text = self.begin();
            self.take_text(Cow::Owned(text), lines)?;
        }
        // Empty input means the end: one call for a last line, one that finds none.
        self.step(&[], lines)?;
        match self.columns {
            Some(_) => Ok(()),
            None => Err(self.bad_header(1, "the file is empty")),
        }
    }

    /// Reads up to the end of the record or of the piece, or the maximum length. Returns the rest of the piece.
    fn step<'a>(&mut self, piece: &'a [u8], lines: &mut Vec<ImportLine>) -> Result<&'a [u8], BadHeader> {
        let (result, read, written, ended) = self.reader.read_record(
            piece,
            &mut self.record[self.record_len..],
            &mut self.ends[self.ends_len..],
        );
        let (consumed, rest) = piece.split_at(read);
        self.count_line_ends(consumed);
        self.record_len += written;
        self.ends_len += ended;
        match result {
            ReadRecordResult::Record => {
                let is_ended = matches!(consumed.last(), Some(b'\r' | b'\n'));
                let number = self.lines_ended + u64::from(!is_ended);
                self.take_record(number, lines)?;
                self.clear();
            }
            ReadRecordResult::OutputFull | ReadRecordResult::OutputEndsFull => {
                self.clear();
                self.is_too_long = true;
            }
            ReadRecordResult::InputEmpty | ReadRecordResult::End => {}
        }
        Ok(rest)
    }

    fn count_line_ends(&mut self, consumed: &[u8]) {
        for byte in consumed {
            let ends = *byte == b'\r' || (*byte == b'\n' && !self.is_after_cr);
            self.lines_ended += u64::from(ends);
            self.is_after_cr = *byte == b'\r';
        }
    }

    fn bad_header(&self, number: u64, problem: impl Into<String>) -> BadHeader {
        BadHeader {
            number,
            problem: problem.into(),
        }
    }

    fn take_record(&mut self, number: u64, lines: &mut Vec<ImportLine>) -> Result<(), BadHeader> {
        let Some(columns) = &self.columns else {
            if self.is_too_long {
                return Err(self.bad_header(number, "it is too long"));
            }
            let read = Columns::read(&self.fields(), self.separator);
            self.columns = Some(read.map_err(|problem| self.bad_header(number, problem))?);
            return Ok(());
        };
        let row = if self.is_too_long {
            Err(format!(
                "it is longer than {RECORD_BYTES_MAX} bytes, or a quote is not closed"
            ))
        } else {
            columns.row(&self.fields(), &self.names)
        };
        lines.push(ImportLine { number, row });
        Ok(())
    }

    /// The fields of the record, without spaces around them.
    fn fields(&self) -> Vec<&[u8]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        let fields = starts.zip(&self.ends[..self.ends_len]);
        fields
            .map(|(start, end)| self.record.get(Range { start, end: *end }).unwrap_or_default())
            .map(<[u8]>::trim_ascii)
            .collect()
    }

    fn clear(&mut self) {
        self.record_len = 0;
        self.ends_len = 0;
        self.is_too_long = false;
    }
}

impl Columns {
    fn read(header: &[&[u8]], separator: u8) -> Result<Self, String> {
        if header.iter().any(|name| name.contains(&0)) {
            return Err("it has zero bytes: save the file as UTF-8, or as UTF-16 with a byte order mark".into());
        }
        let is_id = |field: &&[u8]| std::str::from_utf8(field).is_ok_and(|text| text.parse::<DeviceId>().is_ok());
        if header.iter().any(is_id) {
            return Err("it is missing: the first line has to name the columns".into());
        }
        let mut columns = Self {
            count: header.len(),
            ..Self::default()
        };
        let mut id = None;
        for (index, name) in header.iter().enumerate() {
            let column = match name.to_ascii_lowercase().as_slice() {
                b"id" => &mut id,
                b"secret" => &mut columns.secret,
                b"secret_sha256" => &mut columns.secret_sha256,
                b"tenant" => &mut columns.tenant,
                b"model" => &mut columns.model,
                _ => {
                    return Err(format!(
                        "column {} of {}, separated by {}, is not one of id, secret, secret_sha256, tenant, model",
                        index + 1,
                        header.len(),
                        separator_name(separator)
                    ));
                }
            };
            if column.replace(index).is_some() {
                return Err(format!("column {} is there twice", index + 1));
            }
        }
        columns.id = id.ok_or("the column id is missing")?;
        if columns.secret.is_none() && columns.secret_sha256.is_none() {
            return Err("a column secret or secret_sha256 is missing".into());
        }
        Ok(columns)
    }

    /// Returns the row, or what is wrong with it. The error repeats no value.
    fn row(&self, fields: &[&[u8]], names: &IdentityNames) -> Result<ImportRow, String> {
        if fields.len() != self.count {
            return Err(format!("it has {} fields, the header has {}", fields.len(), self.count));
        }
        let field = |column: Option<usize>| {
            column
                .and_then(|index| fields.get(index).copied())
                .filter(|field| !field.is_empty())
        };
        let id = field(Some(self.id)).ok_or("id is missing")?;
        let named = std::str::from_utf8(id)
            .ok()
            .and_then(|text| names.device(text))
            .ok_or_else(|| not_a_device(names))?;
        let secret = match (field(self.secret), field(self.secret_sha256)) {
            (Some(secret), None) => hash_of(secret)?,
            (None, Some(digits)) => hash_from(digits).ok_or("secret_sha256 is not 64 hexadecimal digits")?,
            (Some(_), Some(_)) => return Err("it has both a secret and a secret_sha256".into()),
            (None, None) => return Err("it has neither a secret nor a secret_sha256".into()),
        };
        Ok(ImportRow {
            id: named.id,
            external_id: named.external_id,
            secret,
            tenant: label("tenant", field(self.tenant))?,
            model: label("model", field(self.model))?,
        })
    }
}

/// Whether the beginning of a file has its whole header.
fn shows_separator(beginning: &[u8]) -> bool {
    let text = beginning.trim_ascii_start();
    let first = first_line(text);
    let rest = &text[first.len()..];
    // A first line that names the separator is enough.
    !rest.is_empty()
}

fn first_line(text: &[u8]) -> &[u8] {
    let end = text.iter().position(|byte| matches!(byte, b'\r' | b'\n'));
    &text[..end.unwrap_or(text.len())]
}

fn separator_name(separator: u8) -> String {
    match separator {
        b',' => "commas".into(),
        b';' => "semicolons".into(),
        b'\t' => "tabs".into(),
        other => format!("{:?}", char::from(other)),
    }
}

fn hash_of(secret: &[u8]) -> Result<SecretHash, String> {
    if SECRET_LEN.contains(&secret.len()) && secret.iter().all(u8::is_ascii_graphic) {
        Ok(SecretHash::of(secret))
    } else {
        Err(format!(
            "secret is not {} to {} bytes of visible ASCII",
            SECRET_LEN.start(),
            SECRET_LEN.end()
        ))
    }
}

fn hash_from(digits: &[u8]) -> Option<SecretHash> {
    let bytes = HEXLOWER_PERMISSIVE.decode(digits).ok()?;
    Some(SecretHash::from_bytes(bytes.try_into().ok()?))
}

fn label(name: &str, field: Option<&[u8]>) -> Result<Option<Label>, String> {
    let Some(field) = field else { return Ok(None) };
    std::str::from_utf8(field)
        .map_err(|_| InvalidLabel)
        .and_then(Label::parse)
        .map_err(|problem| format!("{name}: {problem}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "9b0c2e4a-11d2-7f00-8000-0000000000aa";
    const SECRET: &str = "0123456789abcdef";

    /// Read in pieces of every length, which must not matter.
    fn read(file: &[u8]) -> Result<Vec<ImportLine>, BadHeader> {
        let in_pieces = |len: usize| {
            let (mut reader, mut lines) = (DeviceLines::new(IdentityNames::default()), Vec::new());
            for piece in file.chunks(len) {
                reader.feed(piece, &mut lines)?;
            }
            reader.finish(&mut lines)?;
            Ok(lines)
        };
        let whole = in_pieces(file.len().max(1));
        for len in [1, 2, 7] {
            assert_eq!(
                format!("{:?}", in_pieces(len)),
                format!("{whole:?}"),
                "in pieces of {len}"
            );
        }
        whole
    }

    fn bad(file: &str) -> Vec<(u64, String)> {
        let lines = read(file.as_bytes()).unwrap();
        lines
            .into_iter()
            .filter_map(|line| Some((line.number, line.row.err()?)))
            .collect()
    }

    #[test]
    fn good_lines_are_read_whatever_their_ends_quotes_and_columns() {
        let file =
            format!("\u{feff}model, id,secret,tenant\r\nm1,{ID},{SECRET},\r\n\r\n\"a b\",\"{ID}\",\"{SECRET}\",t");

        let lines = read(file.as_bytes()).unwrap();

        let rows: Vec<_> = lines
            .iter()
            .map(|line| (line.number, line.row.as_ref().unwrap()))
            .collect();
        assert_eq!(rows.len(), 2);
        assert_eq!(rows[0].0, 2);
        assert_eq!(rows[1].0, 4);
        assert_eq!(rows[0].1.id.to_string(), ID);
        assert_eq!(rows[0].1.secret, SecretHash::of(SECRET.as_bytes()));
        assert_eq!((&rows[0].1.tenant, rows[0].1.model.as_deref()), (&None, Some("m1")));
        assert_eq!(rows[1].1.model.as_deref(), Some("a b"));
    }

    #[test]
    fn hashes_are_taken_in_either_letter_case() {
        let hash = "2C26B46B68FFC68FF99B453C1D30413413422D706483BFA0F98A5E886266E7ae";

        let lines = read(format!("id,secret_sha256\n{ID},{hash}\n").as_bytes()).unwrap();

        assert_eq!(lines[0].row.as_ref().unwrap().secret, SecretHash::of(b"foo"));
    }

    #[test]
    fn bad_lines_are_named_by_number_and_never_repeated() {
        let file = format!(
            "id,secret,tenant\n{ID},{SECRET},t\nnope,{SECRET},t\n{ID},short,t\n{ID},{SECRET}\n{ID},{SECRET},\u{e9}\n{ID},,t\n{ID},0123456789 abcdef,t"
        );

        let bad = bad(&file);

        let numbers: Vec<_> = bad.iter().map(|(number, _)| *number).collect();
        assert_eq!(numbers, [3, 4, 5, 6, 7, 8]);
        assert!(
            bad.iter()
                .all(|(_, reason)| !reason.contains("short") && !reason.contains(SECRET))
        );
    }

    #[test]
    fn an_unclosed_quote_is_one_bad_line_and_little_memory() {
        let file = format!("id,secret\n{ID},\"{}", "x\n".repeat(100_000));

        let bad = bad(&file);

        assert_eq!(bad.len(), 1);
        assert!(bad[0].1.contains("quote"), "{bad:?}");
    }

    #[test]
    fn headers_that_say_something_else_are_refused() {
        for header in [
            "",
            "\n\n",
            "id\n",
            "secret,tenant\n",
            "id,secret,id\n",
            "id,secret,colour\n",
            "id|secret\n",
            "i\0d\0,\0s\0\n",
        ] {
            assert!(read(header.as_bytes()).is_err(), "{header:?}");
        }
    }

    #[test]
    fn files_are_read_with_whatever_separator_and_letter_case_they_have() {
        for file in [
            format!("id;secret;tenant\n{ID};{SECRET};t\n"),
            format!("ID\tSecret\tTENANT\r\n{ID}\t{SECRET}\tt\r\n"),
            format!("sep=,\nId,Secret,Tenant\n{ID},{SECRET},t\n"),
            format!("SEP=;\r\nid;secret;tenant\r\n{ID};{SECRET};t\r\n"),
            format!("sep=|\nid|secret|tenant\n{ID}|{SECRET}|t"),
            format!("\u{feff}sep=\t\nid\tsecret\ttenant\n{ID}\t{SECRET}\tt"),
            format!("\n\nid;secret;tenant\n{ID};{SECRET};t"),
            format!("id,secret,tenant\r{ID},{SECRET},t\r"),
        ] {
            let lines = read(file.as_bytes()).unwrap();

            assert_eq!(lines.len(), 1, "{file:?}");
            let row = lines[0].row.as_ref().unwrap();
            assert_eq!(row.id.to_string(), ID, "{file:?}");
            assert_eq!(row.tenant.as_deref(), Some("t"), "{file:?}");
        }
    }

    #[test]
    fn utf_16_is_read_in_either_byte_order() {
        let file = format!("\u{feff}id;secret\r\n{ID};{SECRET}\r\nnope;{SECRET}\r\n{ID};\u{1f4a5}\r\n");
        let units = || file.encode_utf16();
        for bytes in [
            units().flat_map(u16::to_le_bytes).collect::<Vec<_>>(),
            units().flat_map(u16::to_be_bytes).collect::<Vec<_>>(),
        ] {
            let lines = read(&bytes).unwrap();

            let good: Vec<_> = lines.iter().map(|line| (line.number, line.row.is_ok())).collect();
            assert_eq!(good, [(2, true), (3, false), (4, false)]);
        }
    }

    #[test]
    fn lines_are_counted_whatever_ends_them() {
        for end in ["\n", "\r", "\r\n"] {
            let file = [
                "id,secret",
                "",
                &format!("{ID},{SECRET}"),
                "nope,x",
                &format!("{ID},{SECRET}"),
                "nope,y",
            ]
            .join(end);

            let numbers: Vec<_> = bad(&file).into_iter().map(|(number, _)| number).collect();

            assert_eq!(numbers, [4, 6], "{end:?}");
        }
        let file = format!("sep=;\r\nid;secret\r\n{ID};{SECRET}\r\nnope;x\r\n");
        assert_eq!(bad(&file)[0].0, 4);
    }

    #[test]
    fn bad_header_is_named_with_its_line_and_what_separates_its_columns() {
        for (file, words) in [
            (
                "id;secret;colour\n",
                "line 1, the header: column 3 of 3, separated by semicolons,",
            ),
            (
                "sep=;\nid,secret\n",
                "line 2, the header: column 1 of 1, separated by semicolons,",
            ),
            ("\n\nid,x\n", "line 3, the header: column 2 of 2, separated by commas,"),
            (&format!("{ID},{SECRET}\n"), "line 1, the header: it is missing"),
        ] {
            let message = read(file.as_bytes()).unwrap_err().to_string();

            assert!(message.starts_with(words), "{message}");
            assert!(!message.contains(SECRET), "{message}");
        }
        let utf_16_without_mark: Vec<u8> = "id,secret\n".encode_utf16().flat_map(u16::to_le_bytes).collect();
        assert!(read(&utf_16_without_mark).unwrap_err().to_string().contains("UTF-16"));
    }

    #[test]
    fn ids_that_are_not_uuids_are_taken_where_there_is_a_namespace() {
        let names = IdentityNames {
            namespace: Some(uuid::Uuid::NAMESPACE_DNS),
            ..IdentityNames::default()
        };
        let (mut reader, mut lines) = (DeviceLines::new(names), Vec::new());
        let file = format!("id,secret\nwww.example.com,{SECRET}\n{ID},{SECRET}\n");

        reader.feed(file.as_bytes(), &mut lines).unwrap();
        reader.finish(&mut lines).unwrap();

        let rows: Vec<_> = lines.iter().map(|line| line.row.as_ref().unwrap()).collect();
        assert_eq!(rows[0].id.to_string(), "2ed6657d-e927-568b-95e1-2665a8aea6a2");
        assert_eq!(rows[0].external_id.as_deref(), Some("www.example.com"));
        assert_eq!((rows[1].id.to_string().as_str(), &rows[1].external_id), (ID, &None));
    }
}
