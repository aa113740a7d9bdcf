//! Pagemaps are written and read back, over chains of parents, against a model that knows each single page.

use std::{collections::BTreeMap, os::unix::fs::FileExt, path::Path};

use proptest::prelude::*;

use super::*;
use crate::image::proto::{InventoryEntry, PagemapEntry, PagemapHead};

fn commit(dir: &ImageDir) {
    dir.commit(&InventoryEntry { fdinfo_per_id: Some(true), ..Default::default() }, Lasting::OnDisk).unwrap();
}

/// What each page holds in one dump: nothing, its data (a byte repeated), or what the parent says.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Page {
    Absent,
    Data(u8),
    Parent,
}

fn page() -> impl Strategy<Value = Page> {
    prop_oneof![Just(Page::Absent), any::<u8>().prop_map(Page::Data), Just(Page::Parent)]
}

fn write(dir: &ImageDir, pages: &[Page]) -> PageCounts {
    let mut writer = PagesWriter::create(dir, ImageKind::Pagemap.id(7), 1).unwrap();
    for (n, page) in pages.iter().enumerate() {
        let range = PageRange::of_pages(0x10000 + n as u64 * PAGE_SIZE, 1).unwrap();
        match page {
            Page::Absent => {}
            Page::Parent => writer.in_parent(range).unwrap(),
            Page::Data(byte) => {
                let offset = writer.append(range).unwrap();
                let file = std::fs::File::from(writer.pages().try_clone_to_owned().unwrap());
                file.write_all_at(&[*byte; PAGE_SIZE as usize], offset).unwrap();
            }
        }
    }
    writer.finish().unwrap()
}

fn resolve(dumps: &[Vec<Page>], n: usize) -> Option<(usize, u8)> {
    dumps.iter().enumerate().find_map(|(dump, pages)| match pages[n] {
        Page::Parent => None,
        Page::Absent => Some(None),
        Page::Data(byte) => Some(Some((dump, byte))),
    })?
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_page_is_found_where_the_model_has_it(
        dumps in proptest::collection::vec(proptest::collection::vec(page(), 24), 1..4),
    ) {
        let tmp = tempfile::tempdir().unwrap();
        for (n, pages) in dumps.iter().enumerate() {
            let dir = ImageDir::create(tmp.path().join(n.to_string())).unwrap();
            let counts = write(&dir, pages);
            prop_assert_eq!(counts.present as usize, pages.iter().filter(|p| matches!(p, Page::Data(_))).count());
            if n + 1 < dumps.len() {
                dir.set_parent(&Path::new("..").join((n + 1).to_string())).unwrap();
            }
            // A full sync for each of these little dumps would take minutes; the inventory alone makes them complete.
            dir.write_one(ImageKind::Inventory, &InventoryEntry {
                img_version: 2, fdinfo_per_id: Some(true), ..Default::default()
            }).unwrap();
            dir.make_waiting().unwrap();
        }
        let dir = opened(&tmp.path().join("0"));
        let map = PageStore::open(&dir).unwrap().process(7).unwrap();
        let wanted: Vec<usize> = (0..24).filter(|&n| dumps[0][n] != Page::Absent).collect();
        let Ok(found) = map.found() else {
            prop_assert!(wanted.iter().any(|&n| resolve(&dumps, n).is_none()));
            return Ok(());
        };
        let mut seen = BTreeMap::new();
        for run in &found {
            let (file, _) = map.pages(run.dump).unwrap();
            for n in 0..run.range.pages() {
                let mut data = [0; PAGE_SIZE as usize];
                file.read_exact_at(&mut data, run.offset + n * PAGE_SIZE).unwrap();
                prop_assert!(data.iter().all(|&b| b == data[0]));
                seen.insert((run.range.start() - 0x10000) / PAGE_SIZE + n, (run.dump, data[0]));
            }
        }
        let model = wanted.iter().map(|&n| (n as u64, resolve(&dumps, n).unwrap())).collect();
        prop_assert_eq!(seen, model);
    }
}

/// A command that another test has just started may hold what we have closed until it runs.
fn opened(path: &Path) -> ImageDir {
    for _ in 0..1000 {
        match ImageDir::open(path) {
            Err(ImageError::Busy { .. }) => std::thread::sleep(std::time::Duration::from_millis(5)),
            other => return other.unwrap(),
        }
    }
    panic!("{} stays busy", path.display());
}

fn entry(vaddr: u64, pages: u64, flags: u32) -> PagemapEntry {
    PagemapEntry { vaddr, compat_nr_pages: 0, nr_pages: Some(pages), in_parent: None, flags: Some(flags) }
}

#[test]
fn nonsense_is_refused() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = ImageDir::create(tmp.path()).unwrap();
    commit(&dir);
    dir.create_file(ImageKind::Pages.id(1)).unwrap().set_len(4 * PAGE_SIZE).unwrap();
    let read = |entries: &[PagemapEntry]| {
        let mut writer = dir.writer(ImageKind::Pagemap.id(7)).unwrap();
        writer.message(&PagemapHead { pages_id: 1 }).unwrap();
        entries.iter().for_each(|e| writer.message(e).unwrap());
        writer.finish().unwrap();
        PageStore::open(&dir).unwrap().process(7)
    };
    assert_eq!(read(&[entry(0x1000, 2, 4), entry(0x5000, 2, 6)]).unwrap().found().unwrap().len(), 2);
    for (what, entries) in [
        ("not at a page", vec![entry(0x1001, 1, 4)]),
        ("no pages", vec![entry(0x1000, 0, 4)]),
        ("beyond the end of addresses", vec![entry(0x1000, u64::MAX / 4096, 4)]),
        ("more than can be counted", vec![entry(0x1000, u64::MAX, 4)]),
        ("twice", vec![entry(0x1000, 2, 4), entry(0x2000, 1, 4)]),
        ("backwards", vec![entry(0x5000, 1, 4), entry(0x1000, 1, 4)]),
        ("unknown flags", vec![entry(0x1000, 1, 12)]),
        ("here and there", vec![entry(0x1000, 1, 5)]),
        ("more data than there is", vec![entry(0x1000, 5, 4)]),
    ] {
        assert!(read(&entries).is_err(), "{what}");
    }
    for (what, entries) in [("no parent", vec![entry(0x1000, 1, 1)]), ("left behind", vec![entry(0x1000, 1, 2)])] {
        assert!(read(&entries).unwrap().found().is_err(), "{what}");
    }
    // As dumps of old say it.
    let old = PagemapEntry { vaddr: 0x1000, compat_nr_pages: 3, ..Default::default() };
    assert_eq!(read(&[old]).unwrap().found().unwrap()[0].range.pages(), 3);
}

#[test]
fn neighbours_become_one_entry_and_long_ones_are_cut() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = ImageDir::create(tmp.path()).unwrap();
    let mut writer = PagesWriter::create(&dir, ImageKind::PagemapShmem.id(3), 1).unwrap();
    let range = |start, pages| PageRange::of_pages(start * PAGE_SIZE, pages).unwrap();
    assert_eq!(writer.append(range(0, 2)).unwrap(), 0);
    assert_eq!(writer.append(range(2, 1)).unwrap(), 2 * PAGE_SIZE);
    writer.in_parent(range(3, (1 << 20) + 5)).unwrap();
    assert!(writer.append(range(2, 1)).is_err());
    std::fs::File::from(writer.pages().try_clone_to_owned().unwrap()).set_len(writer.end()).unwrap();
    assert_eq!(writer.finish().unwrap(), PageCounts { present: 3, in_parent: (1 << 20) + 5 });
    commit(&dir);
    let map = PageStore::open(&dir).unwrap().shmem(3).unwrap();
    let pages: Vec<u64> = map.runs().iter().map(|run| run.range.pages()).collect();
    assert_eq!(pages, [3, 1 << 20, 5]);
}

#[test]
fn data_that_was_not_written_is_noticed() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = ImageDir::create(tmp.path()).unwrap();
    let mut writer = PagesWriter::create(&dir, ImageKind::Pagemap.id(7), 1).unwrap();
    writer.append(PageRange::of_pages(0x1000, 1).unwrap()).unwrap();
    assert!(matches!(writer.finish(), Err(ImageError::Truncated { .. })));
}
