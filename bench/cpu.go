package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// clockTick is the unit of /proc/PID/stat on every Linux that Go runs on.
const clockTick = 10 * time.Millisecond

// cpu is the CPU time, user and system, that the process has used, with its children's if it has workers.
func cpu(pid int, workers bool) (time.Duration, error) {
	var total time.Duration
	for _, p := range family(pid, workers) {
		raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p))
		if err != nil {
			return 0, err
		}
		_, rest, _ := strings.Cut(string(raw), ") ")
		f := strings.Fields(rest)
		user, err1 := strconv.Atoi(f[11])
		sys, err2 := strconv.Atoi(f[12])
		if err1 != nil || err2 != nil {
			return 0, fmt.Errorf("unreadable /proc/%d/stat", p)
		}
		total += time.Duration(user+sys) * clockTick
	}
	return total, nil
}

// memory is the resident memory of the process, with its children's if it has workers.
func memory(pid int, workers bool) (int64, error) {
	var total int64
	for _, p := range family(pid, workers) {
		raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", p))
		if err != nil {
			return 0, err
		}
		pages, err := strconv.ParseInt(strings.Fields(string(raw))[1], 10, 64)
		if err != nil {
			return 0, err
		}
		total += pages * int64(os.Getpagesize())
	}
	return total, nil
}

func family(pid int, workers bool) []int {
	pids := []int{pid}
	if !workers {
		return pids
	}
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, l := range lists {
		raw, _ := os.ReadFile(l)
		for f := range strings.FieldsSeq(string(raw)) {
			if n, err := strconv.Atoi(f); err == nil {
				pids = append(pids, n)
			}
		}
	}
	return pids
}
