//! Messages as bytes: a header, a structure of the message's kind, attributes that may nest.

/// `struct nlmsghdr`.
pub(crate) const HEADER_BYTES: usize = 16;
/// `struct nlattr`.
const ATTRIBUTE_BYTES: usize = 4;
const ALIGNMENT: usize = 4;
/// `NLA_F_NESTED`.
const NESTED: u16 = 1 << 15;
/// `NLA_TYPE_MASK`: without the flags of nesting and byte order.
const KIND_MASK: u16 = 0x3fff;

/// A message to the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    bytes: Vec<u8>,
    /// Its flags ask for an answer.
    pub(crate) is_answered: bool,
}

impl Message {
    /// A message of this kind and with these flags, that begins with the kind's own structure.
    #[must_use]
    pub fn new(kind: u16, flags: u16, structure: &[u8]) -> Self {
        const REQUEST: u16 = 1;
        let mut bytes = vec![0; 4];
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&(flags | REQUEST).to_ne_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(structure);
        let is_answered = flags & crate::ACK != 0;
        Self { bytes, is_answered }.aligned()
    }

    /// With one more attribute.
    #[must_use]
    pub fn with(self, kind: u16, value: &[u8]) -> Self {
        self.nest(kind, |mut message| {
            message.bytes.extend_from_slice(value);
            message
        })
    }

    /// With one more attribute, if there is a value for it.
    #[must_use]
    pub fn with_some<T: AsRef<[u8]>>(self, kind: u16, value: Option<T>) -> Self {
        match value {
            Some(value) => self.with(kind, value.as_ref()),
            None => self,
        }
    }

    /// With a text and the zero that ends it.
    #[must_use]
    pub fn with_text(self, kind: u16, text: &str) -> Self {
        self.with(kind, &[text.as_bytes(), &[0]].concat())
    }

    /// With an attribute of the attributes that `fill` adds.
    #[must_use]
    pub fn with_nested(self, kind: u16, fill: impl FnOnce(Self) -> Self) -> Self {
        self.nest(kind | NESTED, fill)
    }

    fn nest(mut self, kind: u16, fill: impl FnOnce(Self) -> Self) -> Self {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 2]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        let mut filled = fill(self);
        let length = u16::try_from(filled.bytes.len() - start).unwrap_or(u16::MAX);
        if let Some(place) = filled.bytes.get_mut(start..start + 2) {
            place.copy_from_slice(&length.to_ne_bytes());
        }
        filled.aligned()
    }

    fn aligned(mut self) -> Self {
        let length = self.bytes.len().next_multiple_of(ALIGNMENT);
        self.bytes.resize(length, 0);
        self
    }

    /// Its bytes, under this number.
    pub(crate) fn numbered(&self, sequence: u32) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        for (at, word) in [(0, length), (8, sequence)] {
            if let Some(place) = bytes.get_mut(at..at + 4) {
                place.copy_from_slice(&word.to_ne_bytes());
            }
        }
        bytes
    }
}

/// A message of the kernel's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) sequence: u32,
    /// What comes behind the header.
    pub(crate) body: Vec<u8>,
}

impl Answer {
    /// Cuts what one read gave into messages.
    pub(crate) fn all_of(mut bytes: &[u8]) -> Vec<Self> {
        let mut answers = Vec::new();
        while let (Some(length), Some(kind), Some(flags), Some(sequence)) = (
            u32_at(bytes, 0),
            u16_at(bytes, 4),
            u16_at(bytes, 6),
            u32_at(bytes, 8),
        ) {
            let Some(body) = bytes.get(HEADER_BYTES..length as usize) else {
                break;
            };
            answers.push(Self {
                kind,
                flags,
                sequence,
                body: body.to_vec(),
            });
            let next = (length as usize).next_multiple_of(ALIGNMENT);
            bytes = bytes.get(next..).unwrap_or_default();
        }
        answers
    }

    /// The attributes behind a structure of that many bytes.
    #[must_use]
    pub fn attributes(&self, structure_bytes: usize) -> Attributes<'_> {
        let at = structure_bytes.next_multiple_of(ALIGNMENT);
        Attributes(self.body.get(at..).unwrap_or_default())
    }
}

/// Attributes one after the other, as kind and value; what is malformed ends them.
#[derive(Debug, Clone, Copy)]
pub struct Attributes<'a>(pub(crate) &'a [u8]);

impl<'a> Attributes<'a> {
    /// The value of the first attribute of this kind.
    #[must_use]
    pub fn get(mut self, kind: u16) -> Option<&'a [u8]> {
        self.find_map(|(found, value)| (found == kind).then_some(value))
    }

    /// The number that is that value.
    #[must_use]
    pub fn number(self, kind: u16) -> Option<u32> {
        self.get(kind).and_then(|value| u32_at(value, 0))
    }

    /// The attributes that are that value.
    #[must_use]
    pub fn nested(self, kind: u16) -> Attributes<'a> {
        Attributes(self.get(kind).unwrap_or_default())
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length = usize::from(u16_at(self.0, 0)?);
        let kind = u16_at(self.0, 2)? & KIND_MASK;
        let value = self.0.get(ATTRIBUTE_BYTES..length)?;
        let next = length.next_multiple_of(ALIGNMENT);
        self.0 = self.0.get(next..).unwrap_or_default();
        Some((kind, value))
    }
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let word = bytes.get(at..at + 2)?.try_into().ok()?;
    Some(u16::from_ne_bytes(word))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..at + 4)?.try_into().ok()?;
    Some(u32::from_ne_bytes(word))
}
