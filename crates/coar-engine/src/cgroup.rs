//! Limits on memory and processors that a container or a service manager sets: control groups, versions 1 and 2. The
//! kernel enforces the limits of all ancestors of a group, so all of them are read.

use std::path::{Path, PathBuf};

/// The limits of this process's control groups.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Limits {
    /// Memory of the group that is closest to its limit.
    pub memory: Option<Memory>,
    /// Processors, by the lowest quota; may be a fraction.
    pub processors: Option<f64>,
}

/// A group's memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    pub limit: u64,
    /// How much may still be allocated before the kernel kills a process. Inactive pages of files do not count as used.
    pub free: u64,
}

impl Limits {
    /// The limits of this process.
    pub fn current() -> Self {
        Self::read(Path::new("/"))
    }

    /// Like [`Self::current`], with `proc` and the hierarchies below `root`. Files that cannot be read impose no limit.
    pub fn read(root: &Path) -> Self {
        let text = |path: &str| std::fs::read_to_string(root.join(path)).unwrap_or_default();
        let (groups, mounts) = (text("proc/self/cgroup"), text("proc/self/mountinfo"));
        let mut limits = Self::default();
        for mount in mounts.lines().filter_map(Mount::parse) {
            let Some(group) = groups.lines().find_map(|line| mount.group(line)) else {
                continue;
            };
            for dir in mount.directories(root, group) {
                limits.lower(mount.version, &dir);
            }
        }
        limits
    }

    fn lower(&mut self, version: Version, dir: &Path) {
        if let Some(memory) = memory(version, dir)
            && self.memory.is_none_or(|known| memory.free < known.free)
        {
            self.memory = Some(memory);
        }
        if let Some(quota) = processors(version, dir) {
            self.processors = Some(self.processors.map_or(quota, |known| known.min(quota)));
        }
    }

    /// The number of threads that can run all the time; at least one. With more threads than the quota, all of them are
    /// throttled for a part of each period.
    pub fn threads(&self) -> Option<usize> {
        self.processors.map(|quota| (quota as usize).max(1))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// A mounted hierarchy of groups.
#[derive(Debug, PartialEq)]
struct Mount<'a> {
    version: Version,
    /// Version 1: what it controls.
    controllers: Vec<&'a str>,
    /// The group that is mounted, and the mount point.
    group: &'a str,
    at: &'a str,
}

impl<'a> Mount<'a> {
    /// Parses a line of mountinfo: `31 23 0:28 ROOT PLACE OPTIONS TAGS… - TYPE SOURCE OPTIONS`
    fn parse(line: &'a str) -> Option<Self> {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(3);
        let (group, at) = (mount.next()?, mount.next()?);
        let mut filesystem = filesystem.split(' ');
        let version = match filesystem.next()? {
            "cgroup" => Version::One,
            "cgroup2" => Version::Two,
            _ => return None,
        };
        let controllers: Vec<&str> = match version {
            Version::One => filesystem.nth(1)?.split(',').collect(),
            Version::Two => vec![],
        };
        let wanted = version == Version::Two || controllers.iter().any(|name| matches!(*name, "memory" | "cpu"));
        wanted.then_some(Self {
            version,
            controllers,
            group,
            at,
        })
    }

    /// The group of this process in this hierarchy, if the line of `/proc/self/cgroup` belongs to it:
    /// `4:memory:/group`, or `0::/group` in version 2.
    fn group<'b>(&self, line: &'b str) -> Option<&'b str> {
        let (_, line) = line.split_once(':')?;
        let (controllers, group) = line.split_once(':')?;
        let same = match self.version {
            Version::Two => controllers.is_empty(),
            Version::One => {
                !controllers.is_empty() && controllers.split(',').all(|name| self.controllers.contains(&name))
            }
        };
        same.then_some(group)
    }

    /// The folders of the group and of its visible ancestors. In a container the mounted group is often the process's
    /// own, named by its path on the host.
    fn directories(&self, root: &Path, group: &str) -> Vec<PathBuf> {
        let top = root.join(self.at.trim_start_matches('/'));
        let inside = Path::new(group).strip_prefix(self.group).unwrap_or(Path::new(""));
        inside.ancestors().map(|below| top.join(below)).collect()
    }
}

fn number(dir: &Path, file: &str) -> Option<i64> {
    std::fs::read_to_string(dir.join(file)).ok()?.trim().parse().ok()
}

/// Version 1 represents "no limit" by a number of pages that no machine has.
const UNLIMITED: u64 = 1 << 60;

fn memory(version: Version, dir: &Path) -> Option<Memory> {
    let (limit, used, inactive) = match version {
        Version::Two => ("memory.max", "memory.current", "inactive_file "),
        Version::One => ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
    };
    let limit = u64::try_from(number(dir, limit)?)
        .ok()
        .filter(|limit| *limit < UNLIMITED)?;
    let used = u64::try_from(number(dir, used)?).ok()?;
    let stat = std::fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
    let inactive = stat
        .lines()
        .find_map(|line| line.strip_prefix(inactive)?.trim().parse().ok());
    let taken = used.saturating_sub(inactive.unwrap_or(0));
    Some(Memory {
        limit,
        free: limit.saturating_sub(taken),
    })
}

fn processors(version: Version, dir: &Path) -> Option<f64> {
    let (quota, period) = match version {
        Version::Two => {
            // `max 100000` where there is no quota.
            let text = std::fs::read_to_string(dir.join("cpu.max")).ok()?;
            let (quota, period) = text.trim().split_once(' ')?;
            (quota.parse().ok()?, period.parse().ok()?)
        }
        // -1 where there is no quota.
        Version::One => (number(dir, "cpu.cfs_quota_us")?, number(dir, "cpu.cfs_period_us")?),
    };
    (quota > 0 && period > 0).then(|| quota as f64 / period as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tree of files, each with its content.
    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (path, content) in files {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        dir
    }

    const V2: &str = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
    const MIB: u64 = 1 << 20;

    #[test]
    fn version_2_takes_the_lowest_of_all_ancestors() {
        let dir = tree(&[
            ("proc/self/mountinfo", V2),
            ("proc/self/cgroup", "0::/system.slice/coar.service/inner\n"),
            ("sys/fs/cgroup/system.slice/memory.max", "1073741824\n"),
            ("sys/fs/cgroup/system.slice/memory.current", "1020054732\n"),
            ("sys/fs/cgroup/system.slice/cpu.max", "max 100000\n"),
            ("sys/fs/cgroup/system.slice/coar.service/memory.max", "536870912\n"),
            ("sys/fs/cgroup/system.slice/coar.service/memory.current", "209715200\n"),
            (
                "sys/fs/cgroup/system.slice/coar.service/memory.stat",
                "anon 1\ninactive_file 104857600\n",
            ),
            ("sys/fs/cgroup/system.slice/coar.service/cpu.max", "250000 100000\n"),
            ("sys/fs/cgroup/system.slice/coar.service/inner/memory.max", "max\n"),
            ("sys/fs/cgroup/system.slice/coar.service/inner/memory.current", "7\n"),
            (
                "sys/fs/cgroup/system.slice/coar.service/inner/cpu.max",
                "400000 100000\n",
            ),
        ]);
        let limits = Limits::read(dir.path());
        // The slice has less memory left than the service, although its limit is higher.
        assert_eq!(
            limits.memory,
            Some(Memory {
                limit: 1024 * MIB,
                free: 1_073_741_824 - 1_020_054_732
            })
        );
        assert_eq!((limits.processors, limits.threads()), (Some(2.5), Some(2)));
        let slice = dir.path().join("sys/fs/cgroup/system.slice/memory.max");
        std::fs::write(slice, "max\n").unwrap();
        // Inactive pages of files can be reclaimed.
        let service = Memory {
            limit: 512 * MIB,
            free: 412 * MIB,
        };
        assert_eq!(Limits::read(dir.path()).memory, Some(service));
    }

    #[test]
    fn version_1_has_a_hierarchy_for_each_controller() {
        let dir = tree(&[
            (
                "proc/self/mountinfo",
                "33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                 34 31 0:31 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n\
                 35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
            ),
            (
                "proc/self/cgroup",
                "8:pids:/x\n4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n0::/\n",
            ),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "1\n"),
            ("sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes", "268435456\n"),
            ("sys/fs/cgroup/memory/docker/abc/memory.usage_in_bytes", "167772160\n"),
            (
                "sys/fs/cgroup/memory/docker/abc/memory.stat",
                "cache 1\ntotal_inactive_file 67108864\n",
            ),
            ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n"),
            ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n"),
            ("sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us", "50000\n"),
            ("sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us", "100000\n"),
        ]);
        let limits = Limits::read(dir.path());
        assert_eq!(
            limits.memory,
            Some(Memory {
                limit: 256 * MIB,
                free: 160 * MIB
            })
        );
        assert_eq!((limits.processors, limits.threads()), (Some(0.5), Some(1)));
    }

    #[test]
    fn a_containers_own_group_may_be_the_mounted_one() {
        // Without a namespace the group has the host's name, and the mount contains only this group.
        let dir = tree(&[
            (
                "proc/self/mountinfo",
                "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n",
            ),
            ("proc/self/cgroup", "4:memory:/docker/abc\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "1048576\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "0\n"),
        ]);
        assert_eq!(Limits::read(dir.path()).memory.unwrap().limit, MIB);
        // A group outside the mounted one.
        std::fs::write(dir.path().join("proc/self/cgroup"), "4:memory:/elsewhere\n").unwrap();
        assert_eq!(Limits::read(dir.path()).memory.unwrap().limit, MIB);
    }

    #[test]
    fn without_groups_nothing_is_limited() {
        let dir = tree(&[("proc/self/mountinfo", V2), ("proc/self/cgroup", "nonsense\n0::/a\n")]);
        assert_eq!(Limits::read(dir.path()), Limits::default());
        assert_eq!(Limits::read(&dir.path().join("absent")), Limits::default());
        assert_eq!(Limits::default().threads(), None);
    }
}
