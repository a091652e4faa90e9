//! The multiprocessor table (Intel MultiProcessor Specification 1.4): how a machine
//! without ACPI tells the kernel its processors and interrupt lines.

/// The local APIC's address.
const LOCAL_APIC: u32 = 0xfee0_0000;
/// The I/O APIC's address.
const IO_APIC: u32 = 0xfec0_0000;
/// The version of the local APIC that KVM emulates.
const APIC_VERSION: u8 = 0x14;
/// The only bus.
const ISA_BUS: u8 = 0;

/// The floating pointer and, behind it, the table, to be written at `address`.
///
/// It lists the interrupt `lines` in use and no other: a kernel programs each one that it is
/// told of, in several trapped accesses. For 32 processors and 16 lines it has 864 bytes and
/// fits in the last KiB of base memory.
#[must_use]
pub fn build(vcpus: u8, lines: &[u8], address: u32) -> Vec<u8> {
    let io_apic_id = vcpus;
    let mut entries = Vec::with_capacity(1024);
    let mut count = 0u16;
    for id in 0..vcpus {
        // §4.3.1: enabled, the first one being the boot processor.
        let flags = if id == 0 { 3 } else { 1 };
        let mut entry = [0; 20];
        entry[1] = id;
        entry[2] = APIC_VERSION;
        entry[3] = flags;
        // Signature (family 6) and features (FPU, APIC): nobody reads them beside CPUID.
        entry[5] = 6;
        entry[8..10].copy_from_slice(&[0x01, 0x02]);
        entries.extend_from_slice(&entry);
        count += 1;
    }
    // §4.3.2: the bus.
    entries.extend_from_slice(&[1, ISA_BUS]);
    entries.extend_from_slice(b"ISA   ");
    // §4.3.3: the I/O APIC, usable.
    entries.extend_from_slice(&[2, io_apic_id, 0x11, 1]);
    entries.extend_from_slice(&IO_APIC.to_le_bytes());
    // §4.3.4: each line of the bus is the same line of the I/O APIC, edge, active high.
    for line in lines {
        entries.extend_from_slice(&[3, 0, 0, 0, ISA_BUS, *line, io_apic_id, *line]);
        count += 1;
    }
    // §4.3.5: the local lines of every processor: ExtINT at 0 (the first alone), NMI at 1.
    entries.extend_from_slice(&[4, 3, 0, 0, ISA_BUS, 0, 0, 0]);
    entries.extend_from_slice(&[4, 1, 0, 0, ISA_BUS, 0, 0xff, 1]);
    count += 1 + 1 + 2;

    let mut table = Vec::with_capacity(16 + 44 + entries.len());
    table.extend_from_slice(&floating_pointer(address + 16));
    table.extend_from_slice(&header(&entries, count));
    table.extend_from_slice(&entries);
    table
}

/// §4.1: what the kernel searches for.
fn floating_pointer(table: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(b"_MP_");
    bytes[4..8].copy_from_slice(&table.to_le_bytes());
    bytes[8] = 1;
    bytes[9] = 4;
    bytes[10] = checksum(&bytes);
    bytes
}

/// §4.2: the table's header.
fn header(entries: &[u8], count: u16) -> [u8; 44] {
    let length = u16::try_from(44 + entries.len()).unwrap_or(u16::MAX);
    let mut bytes = [0; 44];
    bytes[..4].copy_from_slice(b"PCMP");
    bytes[4..6].copy_from_slice(&length.to_le_bytes());
    bytes[6] = 4;
    bytes[8..28].copy_from_slice(b"HULL    MICROVM     ");
    bytes[34..36].copy_from_slice(&count.to_le_bytes());
    bytes[36..40].copy_from_slice(&LOCAL_APIC.to_le_bytes());
    bytes[7] = checksum(&bytes).wrapping_add(checksum(entries));
    bytes
}

/// The byte that makes the sum of all be zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes
            .iter()
            .fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_size_is_a_valid_table_that_fits() {
        for vcpus in 1..=32 {
            let lines: Vec<u8> = (5..21).collect();
            let bytes = build(vcpus, &lines, 0x9fc00);
            assert!(bytes.len() <= 1024, "{} bytes", bytes.len());
            let (pointer, table) = bytes.split_at(16);
            assert_eq!(sum(pointer), 0);
            assert_eq!(sum(table), 0);
            assert_eq!(pointer[4..8], 0x9fc10u32.to_le_bytes());
            assert_eq!(
                usize::from(u16::from_le_bytes([table[4], table[5]])),
                table.len()
            );
            // Walk the entries by their types, as a kernel does.
            let (mut rest, mut seen, mut processors) = (&table[44..], 0, Vec::new());
            while let Some(kind) = rest.first() {
                let size = if *kind == 0 { 20 } else { 8 };
                if *kind == 0 {
                    processors.push((rest[1], rest[3]));
                }
                rest = &rest[size..];
                seen += 1;
            }
            assert_eq!(seen, u16::from_le_bytes([table[34], table[35]]));
            assert_eq!(processors.len(), usize::from(vcpus));
            assert_eq!(processors[0], (0, 3));
            assert!(processors[1..].iter().zip(1..).all(|(p, id)| *p == (id, 1)));
        }
    }
}
